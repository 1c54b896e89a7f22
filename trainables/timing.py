"""Warmed, synchronised timing of models side by side, and the costs of every unit."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from search_spaces import family_of
from search_spaces.plan import Attention, PruningPlan, Unit
from trainables.devices import autocast, describe, synchronise
from trainables.intervals import median_interval
from trainables.tasks import ProfileTask, TimingTask
from trainables.workspace import Workspace

FEWEST, MOST = 7, 200
"""Rounds of a measurement that is to take a given time."""
FEWEST_TO_JUDGE = 15
"""Rounds by which a plan's speedup is judged, at least."""


def count_macs(model: torch.nn.Module, input_size: tuple[int, int, int]) -> float:
    """Return the multiply-accumulates of one image, counted by torch's flop counter with no data."""
    # The counter follows gradients where there are any, and fails where a parameter is a module's input.
    shadow = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.zeros(1, *input_size, device="meta"))
    return counter.get_total_flops() / 2


def count_params(model: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


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
    return interleaved_calls(calls_of(models, pixels), pixels.device, repeats=repeats, amp=amp)


def calls_of(models: Sequence[torch.nn.Module], pixels: torch.Tensor) -> list[Callable[[], object]]:
    """Return what calls each of the models with one batch."""
    return [partial(model, pixels) for model in models]


@torch.inference_mode()
def interleaved_calls(
    calls: Sequence[Callable[[], object]], device: torch.device, *, repeats: int, amp: bool = True
) -> np.ndarray:
    """Time each call in turn, again and again; see `interleaved_seconds`. Returns seconds, shape (repeats, calls)."""
    seconds = np.empty((repeats + 2, len(calls)))
    with autocast(device, amp):
        for row in seconds:
            for column, call in enumerate(calls):
                synchronise(device)
                start = time.perf_counter()
                call()
                synchronise(device)
                row[column] = time.perf_counter() - start
    return seconds[2:]


def calls_within(
    seconds: float,
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    fewest: int = FEWEST,
    amp: bool = True,
) -> np.ndarray:
    """Time each call in turn for about so long, in `fewest` to `MOST` rounds; see `interleaved_calls`."""
    one_round = float(np.median(interleaved_calls(calls, device, repeats=3, amp=amp).sum(axis=1)))
    return interleaved_calls(calls, device, repeats=int(np.clip(seconds / one_round, fewest, MOST)), amp=amp)


def profile(task: ProfileTask) -> dict[str, Any]:
    """Measure what the dense model costs and what removing (and merging) each unit saves.

    Units of one kind that save the same MACs and parameters have the same shape, so they share one saving in seconds:
    that of a model without half of them, over their number, which stands out of the noise better than one unit does.

    Returns:
        `device`, and `rows`: one for the dense model and one a unit, with macs, params and, by batch size, seconds and
        their spread (interquartile range over repeats).
    """
    workspace = Workspace(task)
    dense, size = workspace.dense, workspace.view.input_size
    whole: dict[str, Any] = {
        "kind": "dense",
        "index": -1,
        "macs": count_macs(dense, size),
        "params": count_params(dense),
    }
    rows = [_counts(dense, unit, task.attention, size, whole) for unit in family_of(dense).units(dense)]
    groups = _alike(rows)
    removed = [group[: (len(group) + 1) // 2] for group in groups]
    plans = [PruningPlan.of(Unit(r["kind"], r["index"]) for r in half) for half in removed]
    models = [dense, *(merged_without(dense, plan, task.attention) for plan in plans)]
    models = [model.to(workspace.device) for model in models]
    for batch in task.batches:
        pixels = torch.randn(batch, *size, device=workspace.device)
        seconds = calls_within(task.seconds / len(task.batches), calls_of(models, pixels), pixels.device)
        whole |= _summary(seconds[:, 0], batch)
        for column, (group, half) in enumerate(zip(groups, removed, strict=True), 1):
            saved = _summary((seconds[:, 0] - seconds[:, column]) / len(half), batch)
            for row in group:
                row |= saved
    return {"device": describe(workspace.device), "rows": [whole, *rows]}


def time_plans(task: TimingTask) -> dict[str, dict[str, dict[str, float]]]:
    """Build the merged model of each plan and time it beside the dense one; weights do not matter for that.

    Returns:
        By plan and batch size the seconds of both, and the speedup with its 95 % interval.
    """
    workspace = Workspace(task)
    dense, size = workspace.dense.to(workspace.device).eval(), workspace.view.input_size
    found: dict[str, dict[str, dict[str, float]]] = {}
    share = task.seconds / max(1, len(task.plans) * len(task.batches))
    for text in task.plans:
        models = [dense, merged_without(dense, PruningPlan.parse(text), task.attention).to(workspace.device)]
        found[text] = {}
        for batch in task.batches:
            pixels = torch.randn(batch, *size, device=workspace.device)
            seconds = calls_within(share, calls_of(models, pixels), pixels.device, fewest=FEWEST_TO_JUDGE)
            found[text][str(batch)] = against_dense(speed(seconds, 0), speed(seconds, 1))
    return found


def speed(seconds: np.ndarray, column: int) -> dict[str, float]:
    """Return a column's median and its speedup over the first, from seconds of shape (rounds, models).

    The speedup has a 95 % interval, `low` to `high`.
    """
    speedup, low, high = median_interval(list(seconds[:, 0] / seconds[:, column]))
    return {"seconds": float(np.median(seconds[:, column])), "speedup": speedup, "low": low, "high": high}


def against_dense(dense: dict[str, float], merged: dict[str, float]) -> dict[str, float]:
    """Return the seconds of both and the speedup with its interval, from what `speed` returns of each."""
    ratio = {name: merged[name] for name in ("speedup", "low", "high")}
    return {"dense_seconds": dense["seconds"], "merged_seconds": merged["seconds"], **ratio}


def _counts(
    dense: torch.nn.Module, unit: Unit, attention: Attention, size: tuple[int, int, int], whole: dict[str, Any]
) -> dict[str, Any]:
    """Return a unit's row with what its removal saves in MACs and parameters."""
    merged = merged_without(dense, PruningPlan.of([unit]), attention)
    return {
        "kind": unit.kind,
        "index": unit.index,
        "macs": whole["macs"] - count_macs(merged, size),
        "params": whole["params"] - count_params(merged),
    }


def _alike(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group the rows of units of one kind and shape."""
    groups: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["macs"], row["params"]), []).append(row)
    return list(groups.values())


def merged_without(dense: torch.nn.Module, plan: PruningPlan, attention: Attention) -> torch.nn.Module:
    """Return a merged copy of a model without a plan's units."""
    family = family_of(dense)
    model: torch.nn.Module = family.merge(family.remove(copy.deepcopy(dense), plan, attention)).eval()
    return model


def _summary(seconds: np.ndarray, batch: int) -> dict[str, float]:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {f"seconds_{batch}": float(median), f"spread_{batch}": float(high - low)}
