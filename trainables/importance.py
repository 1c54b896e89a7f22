"""How much each unit matters, compared within its kind only: the gradients of the two kinds are not comparable.

Two ways: `taylor` looks at the dense model alone, in one pass over some batches; `conditional` looks again after every
removal, because what should go next depends on what went before. It takes as many passes as there are units, each over
the same batches: with 24 units and 16 batches, 384 batches forward and backward. Where that is long, take fewer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from search_spaces import family_of
from search_spaces.plan import KINDS, Attention, PruningPlan, Unit
from trainables.data import ImageSet
from trainables.tasks import RankTask
from trainables.workspace import Workspace


def taylor_importance(
    model: torch.nn.Module,
    images: ImageSet,
    device: torch.device,
    batches: int,
    attention: Attention,
    keep: Collection[Unit] = (),
) -> dict[Unit, float]:
    """Return the first-order Taylor estimate of the loss change when a unit's gate goes from 1 to 0.

    It is |dL/dg| at g = 1, averaged over batches (Molchanov et al. 2019, "Importance Estimation for Neural Network
    Pruning", equation 8, with the gate as the parameter).
    """
    model = model.to(device).eval()
    with family_of(model).gates(model, attention) as gates:
        return _slopes(model, {u: gate for u, gate in gates.items() if u not in keep}, images, device, batches)


def conditional_importance(
    model: torch.nn.Module,
    images: ImageSet,
    device: torch.device,
    batches: int,
    attention: Attention,
    keep: Collection[Unit] = (),
) -> dict[Unit, float]:
    """Remove the least important unit until none is left, and return each unit's importance when it went, in order.

    The kinds take turns in proportion to their numbers of units. The gates of what went stay closed, so importance,
    the same Taylor estimate, is that in the model that is left; nothing is trained in between.
    """
    model = model.to(device).eval()
    gone: dict[Unit, float] = {}
    with family_of(model).gates(model, attention) as installed:
        gates = {unit: gate for unit, gate in installed.items() if unit not in keep}
        while len(gone) < len(gates):
            kind = _next_kind(gates, gone)
            left = {unit: gate for unit, gate in gates.items() if unit.kind == kind and unit not in gone}
            found = _slopes(model, left, images, device, batches)
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
    measure = conditional_importance if task.method == "conditional" else taylor_importance
    kept = PruningPlan.parse(task.keep).units
    found = measure(workspace.dense, images, workspace.device, task.batches, task.attention, kept)
    ordered = found if task.method == "conditional" else _least_first(found)
    return {
        "method": task.method,
        **{kind: [unit.index for unit in ordered if unit.kind == kind] for kind in KINDS},
        "importance": {kind: [ordered[unit] for unit in ordered if unit.kind == kind] for kind in KINDS},
    }
