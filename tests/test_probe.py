"""The elastic probe: what it trains, what its gates leave, what it costs, and what the stage writes."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt_search import probe_stage
from dpt_search.config import BadConfig, RunConfig
from dpt_search.probe_stage import ProbeBeside, probe, probe_task
from dpt_search.probe_table import read_probe
from dpt_search.remote import StageFailed
from dpt_search.run import Run, configured_run
from dpt_search.store import BadRun, RunStore
from search_spaces.plan import PruningPlan, Ranking
from search_spaces.ratios import Cell
from search_spaces.vit import gates, merge, remove
from trainables.engine import Training, evaluate
from trainables.probe import Elastic, drawn_cells, evaluate_cells, run_probe, switch
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.tasks import ProbeTask
from trainables.timing import count_macs
from trainables.workspace import Workspace

RANKING = Ranking((2, 0, 3, 1), (1, 3, 0, 2))
ALL = tuple(RANKING.space)
LINES = tuple(tuple(RANKING.space.line(total)) for total in (2, 5))
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.02, distillation="soft")
LEARNS = replace(RECIPE, epochs=10, lr=0.03, distillation_alpha=0.0)
"""Enough for cells to differ."""
CPU = torch.device("cpu")


@pytest.fixture
def task(tiny: ModelSettings, tiny_data: DataSettings, tmp_path: Path) -> ProbeTask:
    folder = str(tmp_path / "probe")
    return ProbeTask(tiny, tiny_data, 0, "cpu", 1, RECIPE, RANKING, LINES, ALL, "uniform", False, folder)


def weights_of(task: ProbeTask) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(Path(task.weights).read_bytes())


def cells_of(found: dict[str, Any]) -> dict[Cell, float]:
    return {Cell(row["n_attn"], row["n_act"]): row["accuracy"] for row in found["rows"]}


class TestTheGates:
    @pytest.fixture(scope="class")
    def trained(self, tiny: ModelSettings, tiny_data: DataSettings, tmp_path_factory: pytest.TempPathFactory) -> Any:
        """A task whose probe has run, what it found, and its shared weights in a dense model."""
        folder = str(tmp_path_factory.mktemp("probe"))
        task = ProbeTask(tiny, tiny_data, 0, "cpu", 1, LEARNS, RANKING, LINES, ALL, "uniform", False, folder)
        found = run_probe(task)
        workspace = Workspace(task)
        workspace.dense.load_state_dict(weights_of(task))
        return task, found, workspace

    def test_every_cell_has_the_accuracy_of_the_removed_model_with_the_same_weights(self, trained: Any) -> None:
        _, found, workspace = trained
        images = workspace.images("probe", 1000)
        accuracies = cells_of(found)
        assert list(accuracies) == list(ALL)
        for cell in ALL:
            removed = workspace.pruned(RANKING.plan(cell))
            # The probe evaluates merged models: an image on the edge may fall the other way.
            assert accuracies[cell] == pytest.approx(float(evaluate(removed, images, CPU).mean()), abs=1.01 / 24)
        assert len(set(accuracies.values())) > 1

    def test_the_dense_cell_is_plain_evaluation(self, trained: Any) -> None:
        _, found, workspace = trained
        expected = float(evaluate(workspace.dense, workspace.images("probe"), CPU).mean())
        assert cells_of(found)[Cell(0, 0)] == expected

    def test_training_moved_the_weights_and_left_plain_ones(self, trained: Any, tiny: ModelSettings) -> None:
        task, _, _ = trained
        before, after = Workspace(task).dense.state_dict(), weights_of(task)
        assert before.keys() == after.keys()
        assert not torch.equal(before["blocks.1.attn.qkv.weight"], after["blocks.1.attn.qkv.weight"])

    def test_evaluation_leaves_the_model_as_it_was(self, trained: Any) -> None:
        task, _, workspace = trained
        names = [name for name, _ in workspace.dense.named_modules()]
        evaluate_cells(workspace.dense, task, workspace.images("probe", 9), CPU)
        assert [name for name, _ in workspace.dense.named_modules()] == names
        assert all(parameter.requires_grad for parameter in workspace.dense.parameters())

    @settings(max_examples=12)
    @given(st.lists(st.sampled_from(ALL), min_size=1, max_size=4), st.integers(0, 99))
    def test_a_cell_is_the_removed_model_whatever_cells_were_before_it(
        self, trained: Any, cells: list[Cell], seed: int
    ) -> None:
        workspace = trained[2]
        pixels = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        model = workspace.pruned(PruningPlan()).eval()
        with gates(model) as installed, torch.no_grad():
            for cell in cells:
                switch(installed, RANKING.plan(cell))
                gated = model(pixels)
        removed = remove(workspace.pruned(PruningPlan()), RANKING.plan(cells[-1])).eval()
        with torch.no_grad():
            assert torch.allclose(gated, removed(pixels), atol=1e-5)


def test_a_pass_trains_the_drawn_cell_and_leaves_what_is_switched_off(task: ProbeTask) -> None:
    model = Workspace(task).pruned(PruningPlan())
    elastic = Elastic(model, RANKING)
    elastic.cells = iter([Cell(1, 0), Cell(0, 0)])
    pixels = torch.randn(2, 1, 28, 28)
    with gates(model) as elastic.gates:
        elastic(pixels).sum().backward()
        assert not model.blocks[2].attn.attn.qkv.weight.grad.any()
        assert model.blocks[0].attn.attn.qkv.weight.grad.any()
        elastic(pixels).sum().backward()
        assert model.blocks[2].attn.attn.qkv.weight.grad.any()


def test_uniform_draws_every_cell_alike(task: ProbeTask) -> None:
    drawn = list(islice(drawn_cells(task, 0), 5000))
    counts = np.array([drawn.count(cell) for cell in ALL])
    assert counts.sum() == 5000
    assert abs(counts - 200).max() < 60


def test_line_draws_every_budget_alike_and_nothing_else(task: ProbeTask) -> None:
    drawn = list(islice(drawn_cells(replace(task, draw="line"), 0), 4000))
    assert {cell.total for cell in drawn} == {2, 5}
    assert abs(sum(cell.total == 2 for cell in drawn) - 2000) < 150
    assert set(drawn) == {cell for line in LINES for cell in line}


@pytest.mark.parametrize(("draw", "most"), [("uniform", 8), ("line", 5)])
def test_the_sandwich_is_dense_then_smallest_then_any(task: ProbeTask, draw: str, most: int) -> None:
    drawn = list(islice(drawn_cells(replace(task, draw=draw, sandwich=True), 0), 300))
    assert set(drawn[0::3]) == {Cell(0, 0)}
    assert {cell.total for cell in drawn[1::3]} == {most}
    assert len(set(drawn[2::3])) > 5


@pytest.mark.parametrize("sandwich", [False, True])
def test_cost_is_images_times_macs_of_training_teacher_and_evaluation(task: ProbeTask, sandwich: bool) -> None:
    workspace = Workspace(task)
    macs = count_macs(workspace.dense, workspace.view.input_size)
    some = replace(task, cells=(Cell(0, 0), Cell(2, 1)), sandwich=sandwich)
    merged = count_macs(merge(workspace.pruned(RANKING.plan(Cell(2, 1)))), workspace.view.input_size)
    passes = 3 if sandwich else 1
    found = run_probe(some)
    assert found["training_cost"] == pytest.approx(2 * 96 * (3 * passes + 1) * macs)
    assert found["cost"] == pytest.approx(found["training_cost"] + 24 * (macs + merged))
    assert merged < 0.8 * macs


def test_at_most_so_many_class_balanced_images_are_looked_at(task: ProbeTask) -> None:
    found = run_probe(replace(task, images=9, cells=ALL[:1]))
    assert found["rows"][0]["images"] == found["images"]["probe"] == 9
    assert found["images"]["train"] == 96
    assert sorted(np.bincount(Workspace(task).images("probe", 9).labels)) == [3, 3, 3]


@pytest.mark.parametrize("changes", [{}, {"sandwich": True, "draw": "line", "recipe": replace(RECIPE, ema=0.9)}])
def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    task: ProbeTask, tmp_path: Path, changes: dict[str, Any]
) -> None:
    first = replace(task, cells=ALL[:3], **changes)
    again, other = replace(first, folder=str(tmp_path / "again")), replace(first, seed=1)
    found = run_probe(first)
    torch.manual_seed(99)
    assert run_probe(again)["rows"] == found["rows"]
    assert all(torch.equal(tensor, weights_of(again)[name]) for name, tensor in weights_of(first).items())
    drawn = [list(islice(drawn_cells(each, 0), 30)) for each in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_probe_that_was_killed_goes_on_from_its_newest_epoch(
    task: ProbeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = replace(task, cells=ALL[:3], recipe=replace(RECIPE, ema=0.9))
    expected, run_epoch, trained = run_probe(first), Training.run_epoch, []

    def one_epoch(training: Training) -> Any:
        if len(trained) == 1:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append("trained")
        return run_epoch(training)

    monkeypatch.setattr(Training, "run_epoch", one_epoch)
    again = replace(first, folder=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        run_probe(again)
    found = run_probe(again)
    assert trained == ["trained", "killed", "trained"]
    assert (found["rows"], found["losses"], found["cost"]) == (expected["rows"], expected["losses"], expected["cost"])


def test_the_moving_average_is_evaluated_and_kept_without_gates(task: ProbeTask) -> None:
    averaged = replace(task, recipe=replace(LEARNS, ema=0.5))
    found = run_probe(averaged)
    workspace = Workspace(task)
    workspace.dense.load_state_dict(weights_of(averaged))
    images, accuracies = workspace.images("probe"), cells_of(found)
    removed = {cell: merge(workspace.pruned(RANKING.plan(cell))) for cell in (Cell(1, 0), Cell(2, 1), Cell(0, 3))}
    assert all(accuracies[cell] == float(evaluate(model, images, CPU).mean()) for cell, model in removed.items())
    assert len(set(accuracies.values())) > 1


def test_the_probe_does_what_it_is_for(task: ProbeTask) -> None:
    """On average over the cells the shared weights do better than the dense model's own."""
    adapted = replace(task, recipe=replace(RECIPE, epochs=12, lr=0.03, distillation_alpha=0.0))
    before = evaluate_cells(Workspace(task).dense, task, Workspace(task).images("probe"), CPU)
    assert np.mean(list(cells_of(run_probe(adapted)).values())) > np.mean([accuracy for accuracy, _ in before]) + 0.2


def ranked(folder: Path, **changes: Any) -> Run:
    """Return a run up to its ranking."""
    model, data = ModelSettings("vit_tiny_patch16_224"), DataSettings("cifar10")
    config = RunConfig(model, data, run_dir=str(folder), budget="units=2,5", trial=Recipe(lr=0.25))
    config = replace(config, **changes)
    store = RunStore(config.run_dir)
    store.write_json("run.json", {"config": asdict(config), "versions": {}, "commit": "", "created": 1.0})
    store.write_json("ranking.json", {"method": "taylor", "attn": list(RANKING.attn), "act": list(RANKING.act)})
    return configured_run(config, lambda _: None)


class Calls:
    """What stands for a worker."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks: list[ProbeTask] = []
        monkeypatch.setattr(Run, "call", self)

    def __call__(self, target: str, task: ProbeTask, cpus: int) -> dict[str, Any]:
        assert (target, cpus) == ("trainables.probe:run_probe", task.threads)
        self.tasks.append(task)
        rows = [
            {"n_attn": c.n_attn, "n_act": c.n_act, "plan": str(RANKING.plan(c)), "accuracy": c.n_act / 10, "images": 9}
            for c in task.cells
        ]
        return {"rows": rows, "epochs": task.recipe.epochs, "cost": 12.5, "seconds": 1.0, "versions": {"torch": "2"}}


def test_a_run_without_a_probe_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, run = Calls(monkeypatch), ranked(tmp_path, probe_epochs=0)
    probe(run)
    assert calls.tasks == []
    assert not run.store.exists("stages")
    assert read_probe(run.store) is None


def test_the_stage_writes_what_it_promised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, run = Calls(monkeypatch), ranked(tmp_path, probe_epochs=3)
    probe(run)
    probe(run)
    assert len(calls.tasks) == 1
    rows = pq.read_table(tmp_path / "probe.parquet", use_threads=False)
    assert rows.schema.names == ["n_attn", "n_act", "plan", "accuracy", "images"]
    table = read_probe(run.store)
    assert table is not None
    assert table.cells == sorted({Cell(0, 0), *(cell for line in LINES for cell in line)})
    assert np.array_equal(table.accuracies, [cell.n_act / 10 for cell in table.cells])
    assert table.about["cost"] == 12.5
    assert {"epochs", "seconds", "seed", "versions", "draw", "sandwich", "recipe"} <= table.about.keys()


@pytest.mark.parametrize(
    ("changes", "again"),
    [({"probe_lr": 0.1}, True), ({"probe_cells": 3}, True), ({"budget": "units=3"}, True), ({"max_trials": 9}, False)],
)
def test_a_change_that_matters_makes_the_probe_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], again: bool
) -> None:
    calls = Calls(monkeypatch)
    probe(ranked(tmp_path, probe_epochs=3))
    probe(ranked(tmp_path, **{"probe_epochs": 3, **changes}))
    assert len(calls.tasks) == 1 + again


def test_its_recipe_is_a_trials_with_its_own_length_and_learning_rate(tmp_path: Path) -> None:
    made = probe_task(ranked(tmp_path, probe_epochs=3)).recipe
    assert made == Recipe(epochs=3, lr=0.25, distillation="soft")
    own = probe_task(ranked(tmp_path, probe_epochs=3, probe_lr=0.5, probe_draw="line", probe_cells=7))
    assert (own.recipe.lr, own.draw, own.lines, len(own.cells)) == (0.5, "line", LINES, 7)
    assert set(own.cells) <= {Cell(0, 0), *(cell for line in LINES for cell in line)}


def test_what_is_missing_or_broken_is_said(tmp_path: Path) -> None:
    run = ranked(tmp_path, probe_epochs=1, budget="units=99")
    with pytest.raises(BadConfig, match="at most units=8"):
        probe(run)
    run.store.delete("ranking.json")
    with pytest.raises(BadRun, match="no ranking"):
        probe(run)
    run.store.write("probe.parquet", b"PAR1")
    with pytest.raises(BadRun, match=r"probe\.parquet .*: remove it"):
        read_probe(run.store)


class Beside(Calls):
    """A worker that runs the probe while something else goes on, and may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.done, self.error = False, ""
        monkeypatch.setattr(probe_stage, "begin", self.begin)

    def begin(self, config: RunConfig, target: str, task: ProbeTask, cpus: float) -> Any:
        self.found = self(target, task, cpus)
        return self

    def is_done(self) -> bool:
        return self.done

    def value(self) -> Any:
        if self.error:
            raise StageFailed(self.error)
        return self.found


def test_beside_the_trials_it_is_taken_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, run = Beside(monkeypatch), ranked(tmp_path, probe_epochs=3)
    beside = ProbeBeside.started(run, 2)
    assert beside.hints() == []
    worker.done = True
    (hint,) = beside.hints()
    assert hint.shape == (len(ALL),)
    assert read_probe(run.store) is not None
    assert len(ProbeBeside.started(run, 2).hints()) == 1
    assert len(worker.tasks) == 1


@pytest.mark.parametrize(("concurrent", "start"), [(1, "dense"), (2, "probe")])
def test_trials_wait_for_it_where_they_run_one_at_a_time_or_start_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concurrent: int, start: str
) -> None:
    Beside(monkeypatch)
    assert len(ProbeBeside.started(ranked(tmp_path, probe_epochs=3, start=start), concurrent).hints()) == 1


def test_the_search_goes_on_without_a_probe_that_failed_unless_it_starts_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, run = Beside(monkeypatch), ranked(tmp_path, probe_epochs=3)
    said: list[str] = []
    run.say = said.append
    beside = ProbeBeside.started(run, 2)
    worker.done, worker.error = True, "a trace\nDiverged: the loss became nan"
    assert beside.hints() == []
    assert said[-1].endswith("the search goes on without it: Diverged: the loss became nan")
    with pytest.raises(StageFailed):
        ProbeBeside.started(ranked(tmp_path / "other", probe_epochs=3, start="probe"), 2)


@pytest.mark.parametrize("changes", [{"probe_epochs": 0}, {"probe_epochs": 3, "sampler": "tpe"}])
def test_no_search_that_has_no_use_for_it_begins_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    worker = Beside(monkeypatch)
    beside = ProbeBeside.started(ranked(tmp_path, **changes), 2)
    beside.finish()
    assert (worker.tasks, beside.hints()) == ([], [])


@pytest.mark.timeout(240)
def test_the_verb_on_real_ray(tiny: ModelSettings, tiny_data: DataSettings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranked(run, model=tiny, data=tiny_data, trial=RECIPE)
    command = [sys.executable, "-m", "dpt_search", "probe", str(run), "--probe-epochs"]
    done = subprocess.run([*command, "1", "--probe-sandwich=true"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (run / "probe" / "model.safetensors").stat().st_size > 0
    table = read_probe(RunStore(str(run)))
    assert table is not None
    assert len(table.cells) == 1 + sum(map(len, LINES))
    assert ((table.accuracies >= 0) & (table.accuracies <= 1)).all()
    assert (table.about["epochs"], table.about["sandwich"]) == (1, True)
    assert json.loads((run / "run.json").read_text())["config"]["probe_epochs"] == 1
    bad = subprocess.run([*command, "-1"], capture_output=True, text=True, timeout=60)
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert "probe_epochs is -1, but must be at least 0" in bad.stderr
