"""The elastic probe: one short fine-tune of the dense model whose shared weights give every cell a cheap accuracy.

Every batch draws a random cell and switches its units off by their gates; the ranking makes the cells nested. The dense
model teaches, as in one-shot architecture search (Yu and Huang 2019, "Universally Slimmable Networks", sections 3.1 and
3.3: the sandwich rule and distillation in place).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch

from search_spaces import family_of
from search_spaces.plan import PruningPlan, Ranking, Unit
from search_spaces.ratios import Cell
from trainables.checkpoints import load_state, save_state
from trainables.data import ImageSet
from trainables.devices import describe
from trainables.engine import Training, accuracy_and_loss
from trainables.locations import write_bytes
from trainables.tasks import TRAINING_FORWARDS, ProbeTask
from trainables.timing import count_macs, merged_without
from trainables.workspace import Workspace, versions


class Elastic(torch.nn.Module):
    """A model that is another cell at every forward pass; shapes are the model's."""

    def __init__(self, model: torch.nn.Module, ranking: Ranking) -> None:
        """
        Args:
            model: the model.
            ranking: translates a cell into a plan.
        """
        super().__init__()
        self.model = model
        self.gates: Mapping[Unit, torch.Tensor] = {}
        self.cells: Iterator[Cell] = iter(())
        """The cell of each pass to come."""
        self._ranking = ranking

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        switch(self.gates, self._ranking.plan(next(self.cells)))
        logits: torch.Tensor = self.model(pixels)
        return logits


def switch(gates: Mapping[Unit, torch.Tensor], plan: PruningPlan) -> None:
    """Close the gates of the plan's units and open all others; gates that are switched take no gradient."""
    closed = frozenset(plan.units)
    for unit, gate in gates.items():
        gate.requires_grad_(False).fill_(float(unit not in closed))


def drawn_cells(task: ProbeTask, epoch: int) -> Iterator[Cell]:
    """Yield the cell of each pass of an epoch, without end; under the sandwich rule the passes of a batch in a row."""
    rng = np.random.default_rng([task.seed + task.reseed, epoch])
    lines: Sequence[Sequence[Cell]] = task.lines if task.draw == "line" else (tuple(task.ranking.space),)
    most = max(cell.total for line in lines for cell in line)
    smallest = sorted({cell for line in lines for cell in line if cell.total == most})
    while True:
        if task.sandwich:
            yield Cell(0, 0)
            yield smallest[int(rng.integers(len(smallest)))]
        line = lines[int(rng.integers(len(lines)))]
        yield line[int(rng.integers(len(line)))]


def run_probe(task: ProbeTask) -> dict[str, Any]:
    """Train the shared weights, or go on from the newest epoch; write them; evaluate the task's cells with them.

    Returns:
        `rows`: one a cell, with n_attn, n_act, plan, accuracy and loss on the split `probe`, images and cost.
        What it took: `cost` (images times MACs) and the `training_cost` in it, seconds, losses by epoch.

    Raises:
        Diverged: the loss is not finite.
    """
    start = time.perf_counter()
    workspace = Workspace(task, drop_path=task.recipe.drop_path)
    images = workspace.images("probe", task.images)
    macs = count_macs(workspace.dense, workspace.view.input_size)
    model, epochs = _train(task, workspace)
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    write_bytes(task.weights, safetensors.torch.save(weights))
    evaluated = evaluate_cells(model, task, images, workspace.device)
    # The teacher, the dense model, sees every training image once; a closed gate saves nothing.
    training_cost = macs * sum(epoch["images"] for epoch in epochs) * (TRAINING_FORWARDS * task.passes + 1)
    return {
        "rows": [
            {
                "n_attn": cell.n_attn, "n_act": cell.n_act, "plan": str(task.ranking.plan(cell)),
                "accuracy": accuracy, "loss": loss, "images": len(images), "cost": cost,
            }
            for cell, (accuracy, loss, cost) in zip(task.cells, evaluated, strict=True)
        ],
        "epochs": len(epochs),
        "losses": [epoch["loss"] for epoch in epochs],
        "images": {"train": len(workspace.images("train", task.data.subset)), "probe": len(images)},
        "training_cost": training_cost,
        "cost": training_cost + sum(cost for *_, cost in evaluated),
        "seconds": time.perf_counter() - start,
        "device": describe(workspace.device),
        "versions": versions(),
    }  # fmt: skip


def _train(task: ProbeTask, workspace: Workspace) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """Return the trained shared weights as a dense model, and loss and images of every epoch."""
    model = workspace.pruned(PruningPlan()).to(workspace.device)
    elastic = Elastic(model, task.ranking)
    training = Training(
        model, workspace.images("train", task.data.subset), task.recipe, device=workspace.device,
        seed=task.seed + task.reseed, teacher=workspace.dense, workers=task.data.workers, wrap=lambda _: elastic,
        passes=task.passes,
    )  # fmt: skip
    epochs: list[dict[str, float]] = []
    # After the training, whose moving average is a copy of the model: it must have no gates.
    with family_of(model).gates(model, task.attention) as elastic.gates:
        state = load_state(task.state)
        if state is not None and state["task"] == repr(task):
            training.load_state_dict(state["training"])
            epochs = state["epochs"]
        while training.epochs_done < task.recipe.epochs:
            elastic.cells = drawn_cells(task, training.epochs_done)
            epoch = training.run_epoch()
            epochs.append({"loss": epoch.loss, "images": epoch.images})
            save_state(task.state, {"task": repr(task), "training": training.state_dict(), "epochs": epochs})
    return training.result, epochs


def evaluate_cells(
    model: torch.nn.Module, task: ProbeTask, images: ImageSet, device: torch.device
) -> list[tuple[float, float, float]]:
    """Return accuracy, mean cross-entropy and cost (images times MACs) of every cell with a model's weights.

    The model stays as it is. Each cell is evaluated as its merged model, at about half the cost of closed gates.
    """
    found = []
    for cell in task.cells:
        small = merged_without(model, task.ranking.plan(cell), task.attention)
        told = accuracy_and_loss(small, images, device, amp=task.recipe.amp, workers=task.data.workers)
        found.append((*told, count_macs(small, images.view.input_size) * len(images)))
    return found
