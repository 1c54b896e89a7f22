"""What is refused on a real cluster before anything is paid for; a second node that sees other folders is made by a
mount of its own."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clusters import free_ports
from driver import command
from head import BIN, Head, ray_head

from dpt_search.store import RunStore, TrialLog

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as started:
        yield started


@contextmanager
def node_without(head: Head, hidden: Path) -> Iterator[None]:
    """Add a node to the cluster that sees an empty folder in place of `hidden`."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("may not mount here")
    (agent,) = free_ports(1)
    script = (
        f"mount -t tmpfs none {hidden} && exec {BIN / 'ray'} start --address={head.address} --num-cpus=2 --block "
        f"--node-ip-address=127.0.0.1 --dashboard-agent-listen-port={agent} --object-store-memory=100000000"
    )
    node = subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script], env=head.env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await_nodes(head, 2)
        yield
    finally:
        # With its process namespace all that it started goes.
        node.kill()
        node.wait()
        await_nodes(head, 1)


def await_nodes(head: Head, count: int) -> None:
    code = (
        "import ray; ray.init(logging_level='ERROR', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    )
    env = {**head.env, "RAY_ADDRESS": head.address}
    for _ in range(60):
        done = subprocess.run([BIN / "python", "-c", code], env=env, capture_output=True, text=True)
        if done.stdout.strip() == str(count):
            return
        time.sleep(0.5)
    raise AssertionError(f"the cluster never had {count} nodes: {done.stdout}{done.stderr}")


def run_on(head: Head, *arguments: object, verb: str = "dense") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(verb, *arguments), env={**head.env, "RAY_ADDRESS": head.address}, capture_output=True, text=True
    )


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_cluster_where_all_is_well_costs_little(head, small, tmp_path):
    done = run_on(head, tmp_path / "run", "--config", small)
    assert done.returncode == 0, done.stderr
    assert "dense accuracy on val" in done.stdout
    assert not list((tmp_path / "run").glob("preflight*"))


def test_a_run_directory_of_one_node_alone_is_refused(head, small, tmp_path):
    (tmp_path / "run").mkdir()
    with node_without(head, tmp_path / "run"):
        said = refused(run_on(head, tmp_path / "run", "--config", small))
    assert f"run directory '{tmp_path / 'run'}': node " in said
    assert "does not see what the driver" in said
    assert "s3://bucket" in said
    assert not (tmp_path / "run" / "trials").exists()


def test_data_that_one_node_does_not_have_is_refused(head, small, tmp_path):
    with node_without(head, small.parent):
        said = refused(run_on(head, tmp_path / "run", "--config", small))
    assert f"has nothing at data.path '{small.parent}'" in said


def test_what_no_node_can_hold_is_refused_after_a_short_while(head, small, tmp_path):
    start = time.monotonic()
    said = refused(run_on(head, tmp_path / "run", "--config", small, "--cpus-per-trial", 64))
    assert time.monotonic() - start < 60
    assert "no node can hold a trial: 64 CPU wanted on one node; 1 node is up" in said
    assert "none is being started" in said


def test_a_device_that_no_node_has_is_refused(head, small, tmp_path):
    said = refused(run_on(head, tmp_path / "run", "--config", small, "--device", "npu"))
    assert "no node can hold a trial: 1 CPU and 1 NPU wanted on one node" in said


def test_a_fine_tune_whose_workers_cannot_fit_is_refused_before_anything_is_trained(head, small, tmp_path):
    start = time.monotonic()
    said = refused(run_on(head, "--config", small, "--run-dir", tmp_path / "run", "--finetune-workers", 3, verb="run"))
    assert time.monotonic() - start < 60
    assert "finetune_workers is 3, but the cluster has room for 2 workers of 1 CPU and did not begin to grow" in said
    assert "set --finetune-workers 2, or 1..3 for as many as there are" in said
    assert not (tmp_path / "run" / "dense").exists()


def test_of_workers_that_may_be_fewer_only_the_fewest_have_to_fit(head, small, tmp_path):
    options = ("--config", small, "--run-dir", tmp_path / "run", "--finetune-workers", "2..4")
    env = {**head.env, "RAY_ADDRESS": head.address}
    ours = subprocess.Popen(command("run", *options), env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert any("dense accuracy on val" in line for line in ours.stdout)
    finally:
        ours.terminate()
        ours.wait(timeout=60)


def test_a_node_that_joins_a_search_is_looked_at_before_it_is_given_trials(head, small, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("trials", "finetune"))
    options = ("--max-trials", 40, "--max-concurrent", 4)
    env = {**head.env, "RAY_ADDRESS": head.address}
    ours = subprocess.Popen(
        command("search", run, *options), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert any("trial 0 (" in line for line in ours.stdout)
        with node_without(head, small.parent):
            _, complained = ours.communicate(timeout=120)
    finally:
        ours.kill()
    assert ours.returncode == 2, complained
    assert complained.count("\n") == 1, complained
    assert f"has nothing at data.path '{small.parent}'" in complained
    log = TrialLog(RunStore(str(run)))
    assert all(record.status == "finished" for record in log.finished.values())
    assert len(log.finished) < 40


HOLD = """
import ray, sys
ray.init(logging_level="ERROR", log_to_driver=False)
@ray.remote(num_cpus=2)
class Holder:
    def hold(self): return "held"
holder = Holder.remote()
print(ray.get(holder.hold.remote()), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("verb", ["dense", "search"])
def test_while_others_have_all_there_is_a_line_says_so_and_the_run_goes_on_after(head, finished, tmp_path, verb):
    """A stage's call waits, and a trial of Tune's."""
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("trials", "finetune", "dense.json"))
    if verb == "search":
        for name in ("dense/dense.json", "stages/dense.json"):
            shutil.copy(finished / name, run / name)
    env = {**head.env, "RAY_ADDRESS": head.address}
    others = subprocess.Popen(
        [BIN / "python", "-c", HOLD], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert others.stdout.readline() == "held\n"
    ours = subprocess.Popen(command(verb, run), env=env, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in ours.stdout if "nothing has run for" in line)
        others.communicate(timeout=60)
        printed, _ = ours.communicate(timeout=200)
    finally:
        others.kill()
        ours.kill()
    assert "1 CPU wanted on one node; 1 node is up (0 of 2 CPU free); others have the rest" in line
    assert ours.returncode == 0
    assert ("dense accuracy" if verb == "dense" else "trial 3 (") in printed


def test_an_address_where_no_cluster_is_is_refused_at_once(small, tmp_path):
    start = time.monotonic()
    done = subprocess.run(
        command("dense", tmp_path / "run", "--config", small), env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert time.monotonic() - start < 30
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1" in refused(done)
