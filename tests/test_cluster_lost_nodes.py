"""Nodes that are lost in the middle of a trial and of the fine-tune: what ran there goes on elsewhere."""

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import add_node, fixed_cluster, lose, wait_for_nodes
from driver import command, embedded_part

from dpt_search.store import RunStore, TrialLog
from trainables.checkpoints import load_state

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
EPOCHS, LONG_EPOCHS = 6, 12


class Watch:
    """Looks at a run's states while it runs: which epoch each was of, in the order in which they were written."""

    def __init__(self, run: Path, driver: "subprocess.Popen[bytes]") -> None:
        self._run, self._driver = run, driver
        self.epochs: dict[str, list[int]] = {}

    def look(self) -> None:
        for place in [*self._run.glob("checkpoints/*.pt"), self._run / "finetune" / "state.pt"]:
            state = load_state(str(place))
            known = self.epochs.setdefault(place.stem, [])
            if state is not None and [state["training"]["epochs_done"]] != known[-1:]:
                known.append(state["training"]["epochs_done"])

    def until(self, condition: Callable[[], object]) -> None:
        while self._driver.poll() is None and not condition():
            self.look()
            time.sleep(0.05)

    def newest(self, name: str) -> int:
        return max(self.epochs.get(name, [0]), default=0)


def test_trials_and_the_fine_tune_go_on_elsewhere_when_their_nodes_are_lost(tmp_path: Path) -> None:
    hidden, data, run = tmp_path / "hidden", tmp_path / "data", tmp_path / "run"
    for folder in (hidden, data):
        folder.mkdir()
    config = embedded_part(
        data, {"train": 1200, "probe": 100, "val": 200, "test": 200}, data={"subset": 1000}, max_trials=4,
        max_concurrent=2, max_failures=1, timing_seconds=1.0, rank_batches=2, probe_epochs=0,
        trial={"epochs": EPOCHS, "batch_size": 32}, finetune={"epochs": LONG_EPOCHS, "batch_size": 32},
        finetune_workers=2, checkpoint_seconds=0, export_formats="safetensors",
    )  # fmt: skip
    start = command("run", "--config", config, "--run-dir", run)
    with fixed_cluster() as head, (tmp_path / "said.txt").open("w") as said:
        nodes = []
        for count in (2, 3):
            # One after the other: nodes of one machine that start at once may choose the same ports.
            nodes.append(add_node(head, {"CPU": 1}, hidden))
            wait_for_nodes(head.address, count)
        # What the driver keeps beside the run directory is not seen on the nodes, as on machines of their own.
        environment = head.environment | {"TMPDIR": str(hidden)}
        driver = subprocess.Popen(start, env=environment, stdout=said, stderr=said)
        watch = Watch(run, driver)
        try:
            watch.until(lambda: watch.newest("000000") >= 2 and watch.newest("000001") >= 2)
            # Both nodes, one after the other: one failure would end the search.
            for _ in range(2):
                lose(nodes.pop(0))
                nodes.append(add_node(head, {"CPU": 1}, hidden))
                lost = time.monotonic()
                watch.until(lambda since=lost: time.monotonic() > since + 20)
            watch.until(lambda: watch.newest("state") >= 3)
            tuned_before = watch.newest("state")
            lose(nodes.pop(0))
            nodes.append(add_node(head, {"CPU": 1}, hidden))
            watch.until(lambda: False)
        finally:
            driver.kill()
            driver.wait()
    told = (tmp_path / "said.txt").read_text()
    assert driver.returncode == 0, told
    assert "its node was lost; it goes on from its last epoch elsewhere" in told
    log = TrialLog(RunStore(str(run)))
    assert sorted(log.proposed) == sorted(log.finished) == [0, 1, 2, 3], told
    assert Counter(name.split("-")[0] for name in RunStore(str(run)).names("trials") if "finished" in name) == {
        f"{number:06d}": 1 for number in range(4)
    }
    assert all(len(each.accuracies) == EPOCHS for each in log.finished.values()), told
    assert 3 <= tuned_before < LONG_EPOCHS
    tuned = json.loads((run / "finetune" / "finetune.json").read_text())
    assert [epoch["epoch"] for epoch in tuned["epochs"]] == list(range(1, LONG_EPOCHS + 1))
    # A state of an epoch that was there before would mean that more than the epoch in flight was repeated.
    assert set(watch.epochs) >= {"000000", "000001", "state"}
    assert all(epochs == sorted(set(epochs)) for epochs in watch.epochs.values()), watch.epochs
