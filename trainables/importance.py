"""How much each unit matters, compared within its kind only: the gradients of the two kinds are not comparable.

Two ways: `taylor` looks at the dense model alone, in one pass over some batches; `conditional` looks again after every
removal, because what should go next depends on what went before. It takes as many passes as there are units, each over
the same batches: with 24 units and 16 batches, 384 batches forward and backward. Where that is long, take fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from search_spaces import family_of
from search_spaces.plan import KINDS, Attention, PruningPlan, Unit
from trainables.data import ImageSet
from trainables.tasks import RankTask
from trainables.workspace import Workspace

Slopes = Callable[[Mapping[Unit, torch.Tensor]], dict[Unit, float]]
"""Takes gates and returns |dL/dg| of each."""


def importance(
    model: torch.nn.Module,
    images: ImageSet,
    device: torch.device,
    batches: int,
    attention: Attention,
    *,
    method: str = "taylor",
    keep: Collection[Unit] = (),
) -> dict[Unit, float]:
    """Return the first-order Taylor estimate of the loss change when a unit's gate goes from 1 to 0.

    It is |dL/dg| at g = 1, averaged over batches (Molchanov et al. 2019, "Importance Estimation for Neural Network
    Pruning", equation 8, with the gate as the parameter).

    Args:
        model: the dense model.
        images: what the loss is of.
        device: where.
        batches: of 64 images, to average over.
        attention: what stays of a removed attention.
        method: `taylor` estimates all in the dense model; `conditional` removes the least important unit until none is
            left, the kinds taking turns in proportion to their numbers of units. The gates of what went stay closed, so
            a unit's importance is that in the model that was left when it went, in whose order they are returned;
            nothing is trained in between.
        keep: units that are left out.
    """
    model = model.to(device).eval()
    with family_of(model).gates(model, attention) as installed:
        gates = {unit: gate for unit, gate in installed.items() if unit not in keep}
        slopes = partial(_slopes, model, images=images, device=device, batches=batches)
        return _one_by_one(gates, slopes) if method == "conditional" else slopes(gates)


def _one_by_one(gates: Mapping[Unit, torch.Tensor], slopes: Slopes) -> dict[Unit, float]:
    gone: dict[Unit, float] = {}
    while len(gone) < len(gates):
        kind = _next_kind(gates, gone)
        found = slopes({unit: gate for unit, gate in gates.items() if unit.kind == kind and unit not in gone})
        least = min(found, key=lambda unit: (found[unit], unit.index))
        gone[least] = found[least]
        with torch.no_grad():
            gates[least].zero_()
    return gone


def _next_kind(units: Collection[Unit], gone: Collection[Unit]) -> str:
    """Return the kind of which the smaller share is gone; of equal ones the first."""

    def share(kind: str) -> float:
        there = sum(unit.kind == kind for unit in units)
        return sum(unit.kind == kind for unit in gone) / there if there else 1.0

    return min(KINDS, key=share)


def _slopes(
    model: torch.nn.Module, gates: Mapping[Unit, torch.Tensor], images: ImageSet, device: torch.device, batches: int
) -> dict[Unit, float]:
    """Return |dL/dg| of each gate, averaged over batches, with all gates of the model as they are."""
    totals = dict.fromkeys(gates, 0.0)
    for pixels, labels in islice(images.eval_batches(64), batches):
        loss = F.cross_entropy(model(pixels.to(device)), labels.to(device))
        gradients = torch.autograd.grad(loss, list(gates.values()))
        for unit, gradient in zip(gates, gradients, strict=True):
            totals[unit] += abs(float(gradient)) / batches
    return totals


def _least_first(found: Mapping[Unit, float]) -> dict[Unit, float]:
    return {unit: found[unit] for unit in sorted(found, key=lambda unit: (found[unit], unit.index))}


def rank(task: RankTask) -> dict[str, Any]:
    """Rank the units within each kind, least important first.

    Returns:
        Per kind the order of the units' indices and their importance in that order: with `taylor` that in the dense
        model, which grows; with `conditional` that when the unit went.
    """
    workspace = Workspace(task)
    images = workspace.images("train", 64 * task.batches)
    found = importance(
        workspace.dense, images, workspace.device, task.batches, task.attention, method=task.method,
        keep=PruningPlan.parse(task.keep).units,
    )  # fmt: skip
    ordered = found if task.method == "conditional" else _least_first(found)
    return {
        "method": task.method,
        **{kind: [unit.index for unit in ordered if unit.kind == kind] for kind in KINDS},
        "importance": {kind: [ordered[unit] for unit in ordered if unit.kind == kind] for kind in KINDS},
    }
