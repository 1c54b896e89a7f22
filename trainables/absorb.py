"""The gates of a dense model's MLPs, fitted away on training images before anything else is done with it."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import safetensors.torch
import torch

from search_spaces.gated import absorb, gated_paths
from trainables.dense import BadModel
from trainables.devices import DEVICES
from trainables.locations import write_bytes
from trainables.tasks import AbsorbTask
from trainables.workspace import Workspace


def absorb_gates(task: AbsorbTask) -> dict[str, Any]:
    """Fit plain MLPs to the model's gated ones and write the weights of the model with them.

    Returns:
        `errors`, by path of the MLP: what `gated.absorb` returns.

    Raises:
        BadModel: the model has no gated MLP that can be made plain.
    """
    workspace = Workspace(replace(task, model=replace(task.model, gated="keep")))
    # The fit is in float64.
    device = workspace.device if DEVICES[task.device].float64 else torch.device("cpu")
    model = workspace.dense.to(device)
    if not gated_paths(model):
        raise BadModel(f"model.gated is absorb, but {task.model.name} has no gated MLP: leave it out")
    images = workspace.images("train", 64 * task.batches)
    batches = [pixels.to(device) for pixels, _ in islice(images.eval_batches(64), task.batches)]
    errors = absorb(model, batches)
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    write_bytes(task.weights, safetensors.torch.save(weights))
    return {"errors": errors}
