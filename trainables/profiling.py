"""What the dense model costs on the target device and what removing, and merging, each unit saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from search_spaces import family_of
from search_spaces.plan import Attention, PruningPlan, Unit
from trainables.compiling import check_compiler, compiled
from trainables.devices import DEVICES, autocast, describe
from trainables.intervals import median_interval
from trainables.tasks import ProfileTask
from trainables.timing import calls_of, calls_within, count_macs, count_params, merged_without
from trainables.workspace import Workspace

PRECISE = 0.02
"""How well the saving of all units of a group is to be known, as a share of the dense model's seconds. One unit of a
dozen saves 2 to 8 % of them, so plans that are a unit apart can then be told from each other."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """Two plans, and by how many units of a group the second removes more."""

    before: PruningPlan
    after: PruningPlan
    count: int


@dataclass(frozen=True)
class Saving:
    """What one unit saves, in seconds: how much, how far off that may be by noise, and by what else is gone."""

    seconds: float
    noise: float
    apart: float


def profile(task: ProfileTask) -> dict[str, Any]:
    """Measure the costs of the dense model and of every unit.

    Units of one kind that save the same MACs and parameters have the same shape, so they share one saving in seconds:
    that of about half of them, over their number, which stands out of the noise better than one unit does. It is
    measured twice, where nothing else is gone and, with the other half, where all else is; the mean is a unit's saving,
    so that predictions hold at both ends. Compiled, only the first is measured: every variant takes a compilation.

    Returns:
        `device`, `dtype`, `threads`, `compiled`, `rounds` by batch size, `compile_seconds`, `warnings`, and `rows`: one
        for the dense model and one a unit, with macs, params and, by batch size, seconds and their spread: the half
        width of the median's 95 % interval and, for a unit, half of the difference of its two savings.

    Raises:
        BadInput: there is no compiler, and models were to be compiled.
    """
    workspace = Workspace(task)
    dense, size, device = workspace.dense, workspace.view.input_size, workspace.device
    if task.compiled:
        check_compiler(device)
    whole = {"kind": "dense", "index": -1, "macs": count_macs(dense, size), "params": count_params(dense)}
    rows = [_counts(dense, unit, task.attention, size, whole) for unit in family_of(dense).units(dense)]
    groups = _alike(rows)
    steps = _steps(groups, both_ends=not task.compiled)
    plans = list(dict.fromkeys(plan for group in steps for step in group for plan in (step.before, step.after)))
    models = [merged_without(dense, plan, task.attention).to(device) for plan in plans]
    calls = [compiled(model) if task.compiled else model for model in models]
    savings = [partial(saving, steps=group, columns={plan: i for i, plan in enumerate(plans)}) for group in steps]
    found: dict[str, Any] = {"rounds": {}, "compile_seconds": 0.0}
    seconds_left, unsure = task.seconds, list[str]()
    for left, batch in zip(range(len(task.batches), 0, -1), task.batches, strict=True):
        pixels = torch.randn(batch, *size, device=device)
        if task.compiled:
            found["compile_seconds"] += _seconds_to_compile(calls, pixels)
        begun = time.perf_counter()
        enough = partial(_is_precise, groups=groups, savings=savings)
        seconds = calls_within(seconds_left / left, calls_of(calls, pixels), device, enough=enough)
        seconds_left = max(0.0, seconds_left - (time.perf_counter() - begun))
        found["rounds"][str(batch)] = len(seconds)
        unsure += _record(seconds, batch, whole, groups, savings)
    about = {"dtype": DEVICES[device.type].dtype, "threads": task.threads, "compiled": task.compiled}
    return {"device": describe(device), **about, **found, "warnings": _warnings(unsure), "rows": [whole, *rows]}


def saving(seconds: np.ndarray, steps: Sequence[Step], columns: dict[PruningPlan, int]) -> Saving:
    """Return what a unit of a group saves.

    Args:
        seconds: of every plan in every round, shape (rounds, plans).
        steps: where the saving was measured.
        columns: of the plans.
    """
    ends = [
        median_interval(list((seconds[:, columns[step.before]] - seconds[:, columns[step.after]]) / step.count))
        for step in steps
    ]
    medians = [median for median, _, _ in ends]
    noise = math.sqrt(sum(((high - low) / 2) ** 2 for _, low, high in ends)) / len(ends)
    return Saving(float(np.mean(medians)), noise, (max(medians) - min(medians)) / 2)


def _steps(groups: list[list[Row]], both_ends: bool) -> list[list[Step]]:
    """Return where the saving of each group is measured: from the dense model, and down to all that can be removed."""
    units = [[Unit(row["kind"], row["index"]) for row in group] for group in groups]
    every = {unit for group in units for unit in group}
    found = []
    for group in units:
        first, last = group[: (len(group) + 1) // 2], group[len(group) // 2 :]
        steps = [Step(PruningPlan(), PruningPlan.of(first), len(first))]
        if both_ends:
            steps.append(Step(PruningPlan.of(every - set(last)), PruningPlan.of(every), len(last)))
        found.append(steps)
    return found


Measure = Callable[[np.ndarray], Saving]


def _is_precise(seconds: np.ndarray, groups: Sequence[list[Row]], savings: Sequence[Measure]) -> bool:
    return not any(share > PRECISE for share in _noise(seconds, groups, savings))


def _noise(seconds: np.ndarray, groups: Sequence[list[Row]], savings: Sequence[Measure]) -> list[float]:
    """Return how far off by noise the saving of each whole group may be, as a share of the dense model's seconds."""
    dense = float(np.median(seconds[:, 0]))
    return [measure(seconds).noise * len(group) / dense for group, measure in zip(groups, savings, strict=True)]


def _record(
    seconds: np.ndarray, batch: int, whole: Row, groups: Sequence[list[Row]], savings: Sequence[Measure]
) -> list[str]:
    """Write what was measured at a batch size into the rows; return what is not known well enough."""
    median, low, high = median_interval(list(seconds[:, 0]))
    whole |= {f"seconds_{batch}": median, f"spread_{batch}": (high - low) / 2}
    for group, measure in zip(groups, savings, strict=True):
        found = measure(seconds)
        for row in group:
            row |= {f"seconds_{batch}": found.seconds, f"spread_{batch}": found.noise + found.apart}
    return [
        f"{len(group)} {group[0]['kind']} at batch {batch} to {share:.1%}"
        for group, share in zip(groups, _noise(seconds, groups, savings), strict=True)
        if share > PRECISE
    ]


def _warnings(unsure: list[str]) -> list[str]:
    return unsure and [
        f"what all units of a kind save is not known to {PRECISE:.0%} of the dense model's time: {', '.join(unsure)}; "
        "a quieter machine or a larger --timing-seconds helps"
    ]


def _seconds_to_compile(calls: Sequence[Callable[..., torch.Tensor]], pixels: torch.Tensor) -> float:
    """Call each once, as it will be called when it is timed."""
    begun = time.perf_counter()
    with torch.inference_mode(), autocast(pixels.device, True):
        for call in calls:
            call(pixels)
    return time.perf_counter() - begun


def _counts(dense: torch.nn.Module, unit: Unit, attention: Attention, size: tuple[int, int, int], whole: Row) -> Row:
    """Return a unit's row with what its removal saves in MACs and parameters."""
    merged = merged_without(dense, PruningPlan.of([unit]), attention)
    return {
        "kind": unit.kind,
        "index": unit.index,
        "macs": whole["macs"] - count_macs(merged, size),
        "params": whole["params"] - count_params(merged),
    }


def _alike(rows: list[Row]) -> list[list[Row]]:
    """Group the rows of units of one kind and shape."""
    groups: dict[tuple[str, float, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["macs"], row["params"]), []).append(row)
    return list(groups.values())
