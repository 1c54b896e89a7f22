"""The whole program on stand-ins for NPUs: on this machine, and on a cluster whose head has no software for them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import npu_stand_in
import pytest
from clusters import free_ports, wait_for_nodes
from driver import command, embedded_part

from dpt_search.costs_table import read_costs
from dpt_search.store import RunStore, TrialLog

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
NAME = "Stand-in NPU"
ROOT = Path(__file__).parents[1]


def environment(host: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process on a host: what is in its folder is installed there."""
    fixed = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join((str(host), str(ROOT))), **more}


def dpt_search_on(host: Path, *arguments: object, **more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(host, **more))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two trials at a time, each on half an NPU, and a fine-tune of two workers."""
    return embedded_part(
        tmp_path_factory.mktemp("config"), {"train": 320, "probe": 100, "val": 200, "test": 200}, data={"subset": 160},
        device="npu", devices_per_trial=0.5, max_trials=3, max_concurrent=2, timing_seconds=2.0, rank_batches=1,
        probe_epochs=0, trial={"epochs": 1, "batch_size": 32}, finetune={"epochs": 2, "batch_size": 32},
        finetune_workers=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(config: Path, npu_host: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on this machine, which has two NPUs; never written to."""
    folder = tmp_path_factory.mktemp("made") / "run"
    done = dpt_search_on(npu_host, "run", "--config", config, "--run-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "but this machine holds" not in done.stdout
    return folder


def assert_done_on_npus(run: Path) -> None:
    store = RunStore(str(run))
    finished = TrialLog(store).finished
    assert len(finished) == 3
    assert {record.device for record in finished.values()} == {NAME}
    assert all(record.accuracy is not None for record in finished.values())
    for name in ("dense/dense.json", "finetune/finetune.json", "export/summary.json"):
        assert json.loads((run / name).read_text())["device"] == NAME
    tuned = json.loads((run / "finetune" / "finetune.json").read_text())
    assert (tuned["workers"], len(tuned["epochs"])) == (2, 2)
    summary = json.loads((run / "export" / "summary.json").read_text())
    assert summary["largest_logit_difference"] <= 1e-4
    assert summary["merged"]["macs"] < summary["dense"]["macs"]
    assert read_costs(store) is not None
    assert (run / "report.html").stat().st_size > 0


def test_a_whole_run_on_this_machine(made: Path) -> None:
    assert_done_on_npus(made)


def test_two_trials_share_one_npu(made: Path, npu_host: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made, tmp_path / "run")
    host = npu_stand_in.with_npus(npu_host, tmp_path / "host", npus=1)
    done = dpt_search_on(host, "search", run, "--max-trials", 5)
    assert done.returncode == 0, done.stdout + done.stderr
    log = TrialLog(RunStore(str(run)))
    # The fifth was proposed before the fourth had ended.
    assert [log.proposed[number].seen for number in (3, 4)] == [3, 3]
    assert {log.finished[number].device for number in (3, 4)} == {NAME}


@contextmanager
def cluster(head: Path, worker: Path) -> Iterator[str]:
    """Start a head without CPUs and a worker with two, each with what is in its folder; yield the address."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    scratch = Path(tempfile.mkdtemp(prefix="npu", dir="/tmp"))  # short, as sockets are in it
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=80000000"]
    first = ["--head", f"--port={port}", "--num-cpus=0", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    second = [f"--address={address}", "--num-cpus=2", "--node-ip-address=127.0.0.2"]
    nodes = []
    try:
        with (scratch / "log").open("w") as log:
            for host, arguments in ((head, [*first, f"--temp-dir={scratch}"]), (worker, second)):
                told = [*start, *arguments]
                nodes.append(subprocess.Popen(told, env=environment(host), stdout=log, stderr=log))
                wait_for_nodes(address, len(nodes))
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)
        shutil.rmtree(scratch, ignore_errors=True)


def test_neither_driver_nor_head_imports_torch(config: Path, npu_host: Path, tmp_path: Path) -> None:
    head = npu_stand_in.install_without_driver(tmp_path / "head")
    torch = subprocess.run([sys.executable, "-c", "import torch"], env=environment(head), capture_output=True)
    assert torch.returncode != 0
    (head / "tried").unlink()
    with cluster(head, npu_host) as address:
        done = dpt_search_on(head, "run", "--config", config, "--run-dir", tmp_path / "run", RAY_ADDRESS=address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (head / "tried").exists()
    assert_done_on_npus(tmp_path / "run")


def test_a_worker_without_the_software_ends_the_run_before_anything_is_trained(config: Path, tmp_path: Path) -> None:
    host = npu_stand_in.install_cards_only(tmp_path / "host", npus=2)
    done = dpt_search_on(host, "run", "--config", config, "--run-dir", tmp_path / "run")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "device 'npu' needs torch_npu, which is not installed on this machine" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "dense").exists()
