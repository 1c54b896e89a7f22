"""Merge, write, reload in a fresh process, compare, test once, time: what a user must be able to trust."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch

from search_spaces import family_of
from search_spaces.plan import PruningPlan
from trainables.data import ImageSet
from trainables.dense import build_model, load_weights, read_weights
from trainables.devices import describe
from trainables.engine import evaluate
from trainables.intervals import accuracy_interval, paired_difference
from trainables.locations import read_bytes, write_bytes
from trainables.settings import ModelSettings
from trainables.tasks import ExportTask
from trainables.timing import compared, count_macs, count_params, interleaved_seconds
from trainables.workspace import Workspace, versions

LARGEST_DIFFERENCE = 1e-4
"""Bound on the largest logit difference of merged and unmerged, over the largest unmerged logit, in float32."""


class BadMerge(RuntimeError):
    """The merged model as reloaded does not compute what the unmerged one does."""


def export(task: ExportTask) -> dict[str, Any]:
    """Write `model.safetensors`, `plan.json` and `summary.json`, and return the summary.

    Raises:
        BadMerge: the reloaded model's logits are not the unmerged model's.
    """
    workspace = Workspace(task)
    plan = PruningPlan.parse(task.plan)
    unmerged = workspace.pruned(plan)
    load_weights(unmerged, read_weights(task.weights), task.weights)
    write_model(task, workspace, unmerged.eval())

    test = workspace.images("test", may_read_test=True)
    difference = check_reloaded(task.folder, unmerged, test)
    merged = load_pruned(task.folder)
    device = workspace.device
    right = {"dense": evaluate(workspace.dense, test, device), "merged": evaluate(merged, test, device)}
    models = {"dense": workspace.dense, "merged": merged}
    size = workspace.view.input_size
    summary: dict[str, Any] = {
        "plan": str(plan),
        **{
            name: {**accuracy_interval(right[name]), "images": len(test), "params": count_params(model),
                   "macs": count_macs(model, size)}
            for name, model in models.items()
        },
        "difference": paired_difference(right["dense"], right["merged"]),
        "timing": {str(b): _timing(models, torch.randn(b, *size, device=device), task.repeats) for b in task.batches},
        "largest_logit_difference": difference,
        "device": describe(device),
        "threads": torch.get_num_threads(),
        "dtype": "float32" if device.type == "cpu" else "autocast",
        "compiled": False,
        "versions": versions(),
    }  # fmt: skip
    write_bytes(f"{task.folder}/summary.json", json.dumps(summary, indent=1).encode())
    return summary


def write_model(task: ExportTask, workspace: Workspace, unmerged: torch.nn.Module) -> None:
    """Merge a copy of the unmerged model and write its weights and what is needed to load them."""
    merged = family_of(unmerged).merge(copy.deepcopy(unmerged).cpu())
    weights = {name: tensor.contiguous() for name, tensor in merged.state_dict().items()}
    write_bytes(f"{task.folder}/model.safetensors", safetensors.torch.save(weights))
    kwargs = {**task.model.kwargs, "num_classes": cast(int, unmerged.num_classes)}
    description = {
        "plan": task.plan,
        "model": asdict(ModelSettings(task.model.name, kwargs)),
        "view": asdict(workspace.view),
        "versions": versions(),
    }
    write_bytes(f"{task.folder}/plan.json", json.dumps(description, indent=1).encode())


def load_pruned(path: str) -> torch.nn.Module:
    """Return the merged model of an export folder (path or URI), on the CPU, ready for inference.

    Raises:
        BadModel: the folder's weights do not fit its plan.
        FileNotFoundError: the folder is not an export.
    """
    description = json.loads(read_bytes(f"{path}/plan.json"))
    model = build_model(ModelSettings(**description["model"]))
    family = family_of(model)
    model = family.merge(family.remove(model, PruningPlan.parse(description["plan"])))
    load_weights(model, read_weights(f"{path}/model.safetensors"), path)
    return model.eval()


def check_reloaded(folder: str, unmerged: torch.nn.Module, images: ImageSet) -> float:
    """Compare the unmerged model with the export as a fresh process loads it, on up to 64 images.

    Returns:
        The largest logit difference over the largest unmerged logit.

    Raises:
        BadMerge: it is larger than `LARGEST_DIFFERENCE`.
    """
    pixels, _ = next(images.eval_batches(64))
    with torch.inference_mode():
        expected = unmerged.cpu()(pixels).numpy()
    found = _logits_of_fresh_process(folder, pixels.numpy())
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= LARGEST_DIFFERENCE:
        raise BadMerge(
            f"the merged model in {folder} differs from the unmerged one by {difference:.2e} of the largest logit "
            f"(allowed: {LARGEST_DIFFERENCE:.0e}): the export cannot be trusted, please report this"
        )
    return difference


def _logits_of_fresh_process(folder: str, pixels: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch, "pixels.npy"), Path(scratch, "logits.npy")
        np.save(given, pixels)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "trainables.export", folder, str(given), str(made)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise BadMerge(f"the export in {folder} does not load in a fresh process: {reason}")
        logits: np.ndarray = np.load(made)
    return logits


def _timing(models: dict[str, torch.nn.Module], pixels: torch.Tensor, repeats: int) -> dict[str, float]:
    return compared(interleaved_seconds([m.to(pixels.device).eval() for m in models.values()], pixels, repeats=repeats))


def main(folder: str, given: str, made: str) -> None:
    """Load an export and write its logits for saved pixels: what the fresh process runs."""
    with torch.inference_mode():
        np.save(made, load_pruned(folder)(torch.from_numpy(np.load(given))).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
