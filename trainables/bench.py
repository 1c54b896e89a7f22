"""Models and exports timed side by side: dense or merged, this package's or any of timm's, in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from search_spaces import BadInput
from search_spaces.timm_compat import timm
from trainables.compiling import check_compiler, compiled
from trainables.data import View
from trainables.dense import build_model
from trainables.devices import DEVICES, describe, torch_device
from trainables.export import load_pruned
from trainables.formats import load_format
from trainables.intervals import median_interval
from trainables.locations import read_bytes
from trainables.tasks import BenchModel, BenchTask
from trainables.timing import calls_within

Size = tuple[int, ...]


def bench(task: BenchTask) -> dict[str, Any]:
    """Time every model in turn, again and again, at each batch size.

    Returns:
        `device`, `threads`, `dtype`, and `rows`, one per batch size and model: `name`, `batch`, `input_size`, `seconds`
        (median), `spread` (interquartile range over rounds), and `ratio`, `low` and `high`: how many times as fast as
        the first model it is, the median over rounds with its 95 % interval.

    Raises:
        BadInput: a model cannot be loaded, or there is no compiler.
    """
    torch.set_num_threads(task.threads)
    device = torch_device(task.device)
    if task.compiled:
        check_compiler(device)
    loaded = [_load(model, task, device) for model in task.models]
    return {
        "device": describe(device),
        "threads": task.threads,
        "dtype": DEVICES[device.type].dtype,
        "rows": [row for batch in task.batches for row in _timed(loaded, batch, task, device)],
    }


def _load(asked: BenchModel, task: BenchTask, device: torch.device) -> tuple[Callable[..., torch.Tensor], Size]:
    """Return a model in evaluation mode on the device, and the size (C, H, W) of its images."""
    model, size = _built(asked) if asked.model else _exported(asked, device)
    if asked.location.endswith(".onnx"):
        return model, size
    model = model.to(device).eval()
    return (compiled(model) if task.compiled else model), size


def _built(asked: BenchModel) -> tuple[torch.nn.Module, Size]:
    assert asked.model is not None
    model = build_model(asked.model)
    if asked.data is not None:
        return model, View.of(model, asked.data).input_size
    return model, tuple(timm.data.resolve_model_data_config(model)["input_size"])


def _exported(asked: BenchModel, device: torch.device) -> tuple[torch.nn.Module, Size]:
    where = asked.location
    if where.endswith(".onnx") and device.type != "cpu":
        raise BadInput(f"{asked.name!r} would run on the CPU, the others on {device.type}: time it with --device cpu")
    if where.endswith((".pt2", ".onnx")):
        model = load_format(where, device)
        if len(model.input_size) != 3 or not all(isinstance(side, int) for side in model.input_size):
            raise BadInput(f"{asked.name!r} takes no images of one size (C, H, W): its input is {model.input_size}")
        return model, model.input_size
    return load_pruned(where), tuple(json.loads(read_bytes(f"{where}/plan.json"))["view"]["input_size"])


def _timed(
    loaded: list[tuple[Callable[..., torch.Tensor], Size]], batch: int, task: BenchTask, device: torch.device
) -> list[dict[str, Any]]:
    calls = [partial(model, torch.randn(batch, *size, device=device)) for model, size in loaded]
    seconds = calls_within(task.seconds, calls, device)
    rows = []
    for column, (asked, (_, size)) in enumerate(zip(task.models, loaded, strict=True)):
        low, median, high = map(float, np.percentile(seconds[:, column], [25, 50, 75]))
        row = {"name": asked.name, "batch": batch, "input_size": list(size), "seconds": median, "spread": high - low}
        ratio = median_interval(list(seconds[:, 0] / seconds[:, column]))
        rows.append({**row, **dict(zip(("ratio", "low", "high"), ratio, strict=True))})
    return rows
