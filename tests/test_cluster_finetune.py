"""The long fine-tune on a cluster of three nodes on this machine that loses workers and nodes."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainables.long_finetune import finetune, train_with_ray
from trainables.settings import Recipe
from trainables.tasks import FinetuneTask

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]
EPOCHS = 40
ROOT = Path(__file__).parent.parent
TOLD = {
    "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    # A lost node is missed within seconds.
    "RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "8",
}  # fmt: skip


@dataclass
class Nodes:
    """Nodes of a cluster on this machine; each one's processes have a mark of its own in their environment."""

    folder: str
    marks: list[str] = field(default_factory=list)

    def add(self, *options: str) -> None:
        mark = f"node-{uuid.uuid4().hex}"
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--node-ip-address=127.0.0.1"]
        with open(f"{self.folder}/{mark}.txt", "w") as said:
            subprocess.Popen(
                [*command, f"--object-store-memory={80 * 2**20}", *options], stdout=said, stderr=said,
                env={**os.environ, **TOLD, "MARK_OF_NODE": mark}, start_new_session=True,
            )  # fmt: skip
        self.marks.append(mark)

    def lose(self, mark: str) -> None:
        for process in processes_with(mark, "environ"):
            os.kill(process, signal.SIGKILL)


def processes_with(text: str, file: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / file).read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A head without CPUs, and two nodes with one each."""
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="cf", dir="/tmp") as folder:
        made = Nodes(folder)
        try:
            made.add("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}")
            wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
            ray.init(address=f"127.0.0.1:{port}", log_to_driver=False, logging_level="ERROR")
            for count in (1, 2):
                # One after the other: nodes of one machine that start at once may choose the same ports.
                made.add(f"--address=127.0.0.1:{port}", "--num-cpus=1")
                wait_until(lambda count=count: ray.cluster_resources().get("CPU") == count)
            yield made
        finally:
            ray.shutdown()
            for mark in made.marks:
                made.lose(mark)


@pytest.fixture
def task(tiny, tiny_data, tmp_path) -> FinetuneTask:
    recipe = Recipe(epochs=EPOCHS, batch_size=16, lr=4e-3, mixup=0.5)
    return FinetuneTask(
        tiny, tiny_data, 0, "cpu", 1, "zero", recipe, "attn:1 act:2", str(tmp_path / "run"), "inputs", workers=2,
        fewest=2,
    )  # fmt: skip


def begun(task: FinetuneTask) -> Any:
    """Begin it on the head, which is not lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(train_with_ray).remote(task, {"CPU": 1})


def epochs(task: FinetuneTask) -> list[dict[str, Any]]:
    path = Path(task.progress)
    return json.loads(path.read_text())["epochs"] if path.exists() else []


def wait_until(condition: Callable[[], object], running: Any = None) -> None:
    give_up = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)
        assert running is None or not ray.wait([running], timeout=0)[0], ray.get(running)


def check_went_on(before: list[dict[str, Any]], result: dict[str, Any], task: FinetuneTask) -> None:
    """Only what was in flight was done again, and it ends as it would have with one worker and nothing lost."""
    assert result["epochs"][: len(before)] == before
    assert [record["epoch"] for record in result["epochs"]] == list(range(1, EPOCHS + 1))
    undisturbed = finetune(replace(task, folder=f"{task.folder}/alone"), lambda _: None)
    losses = [[record["loss"] for record in found["epochs"]] for found in (result, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert result["accuracy"] == pytest.approx(undisturbed["accuracy"], abs=0.05)


def test_a_killed_worker_costs_at_most_the_epoch_in_flight(nodes, task):
    running = begun(task)
    wait_until(lambda: len(epochs(task)) > 2, running)
    before = epochs(task)
    os.kill(processes_with("ray::RayTrainWorker", "cmdline")[0], signal.SIGKILL)
    result = ray.get(running, timeout=300)
    assert {record["workers"] for record in result["epochs"]} == {2}
    check_went_on(before, result, task)


def test_a_lost_node_leaves_fewer_workers_with_the_same_batch(nodes, task):
    task = replace(task, fewest=1)
    running = begun(task)
    wait_until(lambda: len(epochs(task)) > 2, running)
    before = epochs(task)
    nodes.lose(nodes.marks[-1])
    result = ray.get(running, timeout=300)
    assert [record["workers"] for record in result["epochs"]][: len(before)] == [2] * len(before)
    assert result["epochs"][-1]["workers"] == result["workers"] == 1
    check_went_on(before, result, task)
