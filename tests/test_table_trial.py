"""One trial of a table, as a worker runs it."""

from dataclasses import replace
from pathlib import Path

import pytest

from search_spaces.plan import PruningPlan
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.table_trial import run_trial
from trainables.tasks import TrialTask
from trainables.trial import Trial
from trainables.workspace import Workspace

RECIPE = Recipe(epochs=2, batch_size=32, lr=0.02)


@pytest.fixture
def task(tiny: ModelSettings, tiny_data: DataSettings, tmp_path: Path) -> TrialTask:
    return TrialTask(tiny, tiny_data, 0, "cpu", 1, "zero", RECIPE, str(tmp_path / "states"))


def test_the_worker_runs_the_trial_the_search_would(task: TrialTask, tmp_path: Path) -> None:
    own = replace(task, checkpoints=str(tmp_path / "own"))
    trial = Trial(Workspace(own), own, 0, PruningPlan.parse("attn:1 act:2"), seed=7)
    expected = [trial.step() for _ in range(2)][-1]
    found = run_trial(task, 0, "attn:1 act:2", 7)
    assert found["accuracies"] == expected["accuracies"]
    assert found["removed_accuracy"] == expected["removed_accuracy"]
    assert found["cost"] == expected["cost"]
    assert found["images"] == {"train": 96, "val": 48}
    assert found["error"] == ""


def test_a_process_loads_the_model_once(task: TrialTask, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    original = Workspace.pruned
    monkeypatch.setattr(Workspace, "pruned", lambda self, *args: built.append(id(self)) or original(self, *args))
    run_trial(task, 0, "attn:1", 0)
    first = len(built)
    run_trial(task, 1, "attn:1", 1)
    assert len(built) == 2 * first > 0
    assert len(set(built)) == 1


def test_a_trial_that_diverges_says_so_and_the_next_one_runs(task: TrialTask) -> None:
    found = run_trial(replace(task, recipe=replace(RECIPE, lr=1e30)), 0, "attn:1", 0)
    assert found["error"].startswith("Diverged: the loss became ")
    assert "\n" not in found["error"]
    assert run_trial(task, 1, "attn:1", 0)["error"] == ""
