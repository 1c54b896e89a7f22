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
from trainables.compiling import compiled
from trainables.data import ImageSet
from trainables.dense import build_model, load_weights, read_weights
from trainables.devices import DEVICES, describe
from trainables.engine import choices
from trainables.formats import STANDALONE, load_format, on_this_disk, write_formats
from trainables.intervals import accuracy_interval, paired_difference
from trainables.locations import read_bytes, write_bytes
from trainables.settings import ModelSettings
from trainables.splits import Indices
from trainables.tasks import FORMATS, ExportTask
from trainables.timing import against_dense, count_macs, count_params, interleaved_seconds, speed
from trainables.workspace import Workspace, versions

LARGEST_DIFFERENCE = 1e-4
"""Bound on the largest logit difference of merged and unmerged, over the largest unmerged logit, in float32."""
ELSEWHERE_IMAGES = 1000
"""About how many test images a format is tested on that does not run on the run's accelerator."""


class BadMerge(RuntimeError):
    """The merged model as reloaded does not compute what the unmerged one does."""


def export(task: ExportTask) -> dict[str, Any]:
    """Write the merged model in every format, `plan.json` and `summary.json`, and return the summary.

    Raises:
        BadMerge: the logits of a format, as reloaded, are not the unmerged model's.
        BadFormat: the model cannot be written in a format.
    """
    workspace = Workspace(task)
    unmerged = workspace.pruned(PruningPlan.parse(task.plan))
    load_weights(unmerged, read_weights(task.weights), task.weights)
    write_model(task, workspace, unmerged.eval())
    merged, device = load_pruned(task.folder), workspace.device
    others = [name for name in task.formats if name != "safetensors"]
    write_formats(others, task.folder, merged, workspace.view.input_size)

    test = workspace.images("test", may_read_test=True)
    differences = {name: check_reloaded(task.folder, name, unmerged, test) for name in ("safetensors", *others)}
    loaded = {name: load_format(f"{task.folder}/{FORMATS[name]}", device) for name in others}
    models = {"dense": workspace.dense, "safetensors": merged, **loaded}
    timing = _timed(task, models, workspace)
    chosen = {
        name: choices(model, _seen_by(name, test, device), _device_of(name, device))
        for name, model in {**models, **_baseline(task, workspace), "unmerged": unmerged}.items()
    }
    summary: dict[str, Any] = {
        "plan": task.plan,
        **_compared(chosen, {**models, "baseline": workspace.dense}, test, workspace.view.input_size),
        "timing": {batch: against_dense(found["dense"], found["safetensors"]) for batch, found in timing.items()},
        "formats": {
            name: {
                **_tested(name, chosen, test, device),
                "largest_logit_difference": differences[name],
                "timing": {batch: found[name] for batch, found in timing.items() if name in found},
            }
            for name in differences
        },
        "largest_logit_difference": differences["safetensors"],
        "device": describe(device),
        "threads": torch.get_num_threads(),
        "dtype": DEVICES[device.type].dtype,
        "compiled": task.compiled,
        "versions": versions(),
    }
    write_bytes(f"{task.folder}/summary.json", json.dumps(summary, indent=1).encode())
    return summary


def _baseline(task: ExportTask, workspace: Workspace) -> dict[str, torch.nn.Module]:
    """Return the dense model after the same fine-tune, where it had one."""
    if not task.baseline:
        return {}
    model = copy.deepcopy(workspace.dense)
    load_weights(model, read_weights(task.baseline), task.baseline)
    return {"baseline": model}


def _compared(
    chosen: dict[str, Indices], models: dict[str, torch.nn.Module], test: ImageSet, size: tuple[int, int, int]
) -> dict[str, Any]:
    """Return accuracy and size of dense, merged and, where there is one, the baseline, with paired differences."""
    names = {"dense": "dense", "merged": "safetensors", "baseline": "baseline"}
    right = {name: chosen[given] == test.labels for name, given in names.items() if given in chosen}
    found: dict[str, Any] = {
        name: {
            **accuracy_interval(right[name]),
            "images": len(test),
            "params": count_params(models[names[name]]),
            "macs": count_macs(models[names[name]], size),
        }
        for name in right
    }
    found["difference"] = paired_difference(right["dense"], right["merged"])
    if "baseline" in right:
        found["baseline"]["difference"] = paired_difference(right["baseline"], right["merged"])
    return found


def _tested(name: str, chosen: dict[str, Indices], test: ImageSet, device: torch.device) -> dict[str, Any]:
    """Return a format's accuracy on test, and on which share of the images it chooses as the unmerged model does."""
    step = _step(name, len(test), device)
    return {
        "file": FORMATS[name],
        "device": _device_of(name, device).type,
        "images": len(chosen[name]),
        **accuracy_interval(chosen[name] == test.labels[::step]),
        "agreement": float(np.mean(chosen[name] == chosen["unmerged"][::step])),
    }


def _seen_by(name: str, test: ImageSet, device: torch.device) -> ImageSet:
    step = _step(name, len(test), device)
    return ImageSet(test.pixels[::step], test.labels[::step], test.view)


def _step(name: str, images: int, device: torch.device) -> int:
    """Return that a model is tested on every n-th image: on all, unless it runs elsewhere than the run does."""
    return 1 if _device_of(name, device) == device else max(1, images // ELSEWHERE_IMAGES)


def _device_of(name: str, device: torch.device) -> torch.device:
    """Return where a format runs: ONNX on the CPU, because onnxruntime's accelerators are packages of their own."""
    return torch.device("cpu") if name == "onnx" else device


def write_model(task: ExportTask, workspace: Workspace, unmerged: torch.nn.Module) -> None:
    """Merge a copy of the unmerged model and write its weights and what is needed to load them."""
    merged = family_of(unmerged).merge(copy.deepcopy(unmerged).cpu())
    weights = {name: tensor.contiguous() for name, tensor in merged.state_dict().items()}
    write_bytes(f"{task.folder}/model.safetensors", safetensors.torch.save(weights))
    kwargs = {**task.model.kwargs, "num_classes": cast(int, unmerged.num_classes)}
    description = {
        "plan": task.plan,
        "attention": task.attention,
        "model": asdict(ModelSettings(task.model.name, kwargs, gated=task.model.gated)),
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
    # Exports of versions that lacked the field removed all of an attention.
    attention = description.get("attention", "zero")
    model = family.merge(family.remove(model, PruningPlan.parse(description["plan"]), attention))
    load_weights(model, read_weights(f"{path}/model.safetensors"), path)
    return model.eval()


def check_reloaded(folder: str, name: str, unmerged: torch.nn.Module, images: ImageSet) -> float:
    """Compare the unmerged model with the export as a fresh process loads it, on up to 64 images.

    Args:
        folder: the export.
        name: of `FORMATS`; all but safetensors have to load where this package is not installed.
        unmerged: the fine-tuned model.
        images: what to compare on.

    Returns:
        The largest logit difference over the largest unmerged logit.

    Raises:
        BadMerge: it is larger than `LARGEST_DIFFERENCE`.
    """
    pixels, _ = next(images.eval_batches(64))
    with torch.inference_mode():
        expected = unmerged.cpu()(pixels).numpy()
    found = _logits_of_fresh_process(folder, name, pixels.numpy())
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= LARGEST_DIFFERENCE:
        raise BadMerge(
            f"the merged model in {folder}, as {name}, differs from the unmerged one by {difference:.2e} of the "
            f"largest logit (allowed: {LARGEST_DIFFERENCE:.0e}): the export cannot be trusted, please report this"
        )
    return difference


def _logits_of_fresh_process(folder: str, name: str, pixels: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch, "pixels.npy"), Path(scratch, "logits.npy")
        np.save(given, pixels)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        program, where = ["-m", "trainables.export"], folder
        if name in STANDALONE:
            program, where = ["-c", STANDALONE[name]], on_this_disk(f"{folder}/{FORMATS[name]}", scratch)
        command = [sys.executable, *program, where, str(given), str(made)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise BadMerge(f"the export in {folder}, as {name}, does not load in a fresh process: {reason}")
        logits: np.ndarray = np.load(made)
    return logits


def _timed(
    task: ExportTask, models: dict[str, torch.nn.Module], workspace: Workspace
) -> dict[str, dict[str, dict[str, float]]]:
    """Time all models that run on the run's device in turn; by batch size and name, seconds and speedup over dense."""
    device = workspace.device
    here = {name: model.to(device).eval() for name, model in models.items() if _device_of(name, device) == device}
    calls = [compiled(model) if task.compiled and name != "onnx" else model for name, model in here.items()]
    timing = {}
    for batch in task.batches:
        pixels = torch.randn(batch, *workspace.view.input_size, device=device)
        seconds = interleaved_seconds(calls, pixels, repeats=task.repeats)
        timing[str(batch)] = {name: speed(seconds, column) for column, name in enumerate(here)}
    return timing


def main(folder: str, given: str, made: str) -> None:
    """Load an export and write its logits for saved pixels: what the fresh process runs."""
    with torch.inference_mode():
        np.save(made, load_pruned(folder)(torch.from_numpy(np.load(given))).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
