"""Warmed, synchronised timing of models side by side, and the costs of every unit."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from search_spaces import family_of
from search_spaces.plan import PruningPlan, Unit
from trainables.devices import autocast, describe, synchronise
from trainables.tasks import ProfileTask
from trainables.workspace import Workspace


def count_macs(model: torch.nn.Module, input_size: tuple[int, int, int]) -> float:
    """Return the multiply-accumulates of one image, counted operator by operator with no data (torch's flop counter)."""
    shadow = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.zeros(1, *input_size, device="meta"))
    return counter.get_total_flops() / 2


def count_params(model: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.inference_mode()
def interleaved_seconds(
    models: Sequence[torch.nn.Module], pixels: torch.Tensor, *, repeats: int, amp: bool = True
) -> np.ndarray:
    """Time one forward pass of each model in turn, again and again, so that drift of the machine hits all alike.

    Args:
        models: in evaluation mode, on the device of `pixels`.
        pixels: one batch, shape (B, C, H, W).
        repeats: number of rounds, after two of warming up.
        amp: mixed precision where the device has it.

    Returns:
        Seconds, shape (repeats, models).
    """
    seconds = np.empty((repeats + 2, len(models)))
    with autocast(pixels.device, amp):
        for row in seconds:
            for column, model in enumerate(models):
                synchronise(pixels.device)
                start = time.perf_counter()
                model(pixels)
                synchronise(pixels.device)
                row[column] = time.perf_counter() - start
    return seconds[2:]


def profile(task: ProfileTask) -> dict[str, Any]:
    """Measure what the dense model costs and what removing (and merging) each unit saves.

    Units of one kind that save the same MACs and parameters have the same shape, so they share one saving: the median
    over all their measurements.

    Returns:
        `device`, and `rows`: one a unit and one for the dense model, with macs, params and, by batch size, seconds and
        their spread (interquartile range).
    """
    workspace = Workspace(task)
    dense, size = workspace.dense.to(workspace.device), workspace.view.input_size
    units = family_of(dense).units(dense)
    macs, params = count_macs(dense, size), count_params(dense)
    pixels = {batch: torch.randn(batch, *size, device=workspace.device) for batch in task.batches}
    repeats = _repeats(dense, pixels, len(units), task.seconds)
    rows = []
    dense_seconds: dict[int, list[np.ndarray]] = {batch: [] for batch in task.batches}
    for unit in units:
        merged = merged_without(dense, unit)
        row: dict[str, Any] = {"kind": unit.kind, "index": unit.index}
        row["macs"], row["params"] = macs - count_macs(merged, size), params - count_params(merged)
        for batch, image in pixels.items():
            seconds = interleaved_seconds([dense, merged], image, repeats=repeats)
            dense_seconds[batch].append(seconds[:, 0])
            row[f"samples_{batch}"] = seconds[:, 0] - seconds[:, 1]
        rows.append(row)
    rows = _pooled(rows, task.batches)
    whole: dict[str, Any] = {"kind": "dense", "index": -1, "macs": macs, "params": params}
    for batch in task.batches:
        whole |= _summary(np.concatenate(dense_seconds[batch]), batch)
    return {"device": describe(workspace.device), "rows": [whole, *rows]}


def merged_without(dense: torch.nn.Module, unit: Unit) -> torch.nn.Module:
    """Return a merged copy of the dense model without one unit."""
    family = family_of(dense)
    model: torch.nn.Module = family.merge(family.remove(copy.deepcopy(dense), PruningPlan.of([unit]))).eval()
    return model


def _repeats(dense: torch.nn.Module, pixels: dict[int, torch.Tensor], units: int, seconds: float) -> int:
    """Return how many repeats of all pairs fit into the time, at least 3 and at most 30."""
    one_round = sum(float(np.median(interleaved_seconds([dense], image, repeats=3))) for image in pixels.values())
    return int(np.clip(seconds / (2 * units * one_round) - 2, 3, 30))


def _pooled(rows: list[dict[str, Any]], batches: tuple[int, ...]) -> list[dict[str, Any]]:
    pooled = []
    for row in rows:
        alike = [r for r in rows if all(r[key] == row[key] for key in ("kind", "macs", "params"))]
        kept = {key: row[key] for key in ("kind", "index", "macs", "params")}
        for batch in batches:
            kept |= _summary(np.concatenate([r[f"samples_{batch}"] for r in alike]), batch)
        pooled.append(kept)
    return pooled


def _summary(seconds: np.ndarray, batch: int) -> dict[str, float]:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {f"seconds_{batch}": float(median), f"spread_{batch}": float(high - low)}
