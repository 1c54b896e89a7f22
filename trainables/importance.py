"""How much each unit matters, compared within its kind only: the gradients of the two kinds are not comparable."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from search_spaces import family_of
from search_spaces.plan import KINDS, Unit
from trainables.data import ImageSet
from trainables.tasks import RankTask
from trainables.workspace import Workspace


def taylor_importance(
    model: torch.nn.Module, images: ImageSet, device: torch.device, batches: int
) -> dict[Unit, float]:
    """Return the first-order Taylor estimate of the loss change when a unit's gate goes from 1 to 0.

    It is |dL/dg| at g = 1, averaged over batches (Molchanov et al. 2019, "Importance Estimation for Neural Network
    Pruning", equation 8, with the gate as the parameter).
    """
    model = model.to(device).eval()
    with family_of(model).gates(model) as gates:
        totals = dict.fromkeys(gates, 0.0)
        for pixels, labels in islice(images.eval_batches(64), batches):
            loss = F.cross_entropy(model(pixels.to(device)), labels.to(device))
            gradients = torch.autograd.grad(loss, list(gates.values()))
            for unit, gradient in zip(gates, gradients, strict=True):
                totals[unit] += abs(float(gradient)) / batches
    return totals


def rank(task: RankTask) -> dict[str, Any]:
    """Rank the units within each kind, least important first.

    Returns:
        Per kind the order of the units' indices and their importance in that order.
    """
    workspace = Workspace(task)
    images = workspace.images("train", 64 * task.batches)
    found = taylor_importance(workspace.dense, images, workspace.device, task.batches)
    orders = {kind: sorted((u for u in found if u.kind == kind), key=lambda u: (found[u], u.index)) for kind in KINDS}
    return {
        "method": "taylor",
        **{kind: [u.index for u in order] for kind, order in orders.items()},
        "importance": {kind: [found[u] for u in order] for kind, order in orders.items()},
    }
