"""The elastic probe: what it trains, what its gates leave, and what it costs."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.plan import Attention, PruningPlan, Ranking
from search_spaces.ratios import Cell
from search_spaces.surgery import gates, merge, remove
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
    return ProbeTask(tiny, tiny_data, 0, "cpu", 1, "zero", RECIPE, RANKING, LINES, ALL, "uniform", False, folder)


def weights_of(task: ProbeTask) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(Path(task.weights).read_bytes())


def cells_of(found: dict[str, Any]) -> dict[Cell, float]:
    return {Cell(row["n_attn"], row["n_act"]): row["accuracy"] for row in found["rows"]}


class TestTheGates:
    @pytest.fixture(scope="class", params=get_args(Attention))
    def trained(
        self,
        request: pytest.FixtureRequest,
        tiny: ModelSettings,
        tiny_data: DataSettings,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Any:
        """A task whose probe has run, what it found, and its shared weights in a dense model."""
        folder = str(tmp_path_factory.mktemp("probe"))
        task = ProbeTask(
            tiny, tiny_data, 0, "cpu", 1, request.param, LEARNS, RANKING, LINES, ALL, "uniform", False, folder
        )
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
        with gates(model, workspace.task.attention) as installed, torch.no_grad():
            for cell in cells:
                switch(installed, RANKING.plan(cell))
                gated = model(pixels)
        removed = remove(workspace.pruned(PruningPlan()), RANKING.plan(cells[-1]), workspace.task.attention).eval()
        with torch.no_grad():
            assert torch.allclose(gated, removed(pixels), atol=1e-5)


def test_a_pass_trains_the_drawn_cell_and_leaves_what_is_switched_off(task: ProbeTask) -> None:
    model = Workspace(task).pruned(PruningPlan())
    elastic = Elastic(model, RANKING)
    elastic.cells = iter([Cell(1, 0), Cell(0, 0)])
    pixels = torch.randn(2, 1, 28, 28)
    with gates(model, task.attention) as elastic.gates:
        elastic(pixels).sum().backward()
        assert not model.blocks[2].attn.qkv.weight.grad.any()
        assert model.blocks[0].attn.qkv.weight.grad.any()
        elastic(pixels).sum().backward()
        assert model.blocks[2].attn.qkv.weight.grad.any()


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
    assert np.mean(list(cells_of(run_probe(adapted)).values())) > np.mean([accuracy for accuracy, *_ in before]) + 0.2
