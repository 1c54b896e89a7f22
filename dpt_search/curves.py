"""The mean of many replays of one strategy, over cost or over virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t as student_t

from dpt_search.compare import POINT, Trace
from dpt_search.map_predictor import Array

Axis = Literal["cost", "time"]


@dataclass(frozen=True)
class Curve:
    """The mean of many replays of one strategy.

    Attributes:
        name: the strategy.
        cost: [m] common grid of cost, or of virtual time, in trials of the dense model.
        mean: [m] regret above the floor, averaged over budgets and replays; nan below the cost of a probe.
        low: [m] lower end of its 95 % interval over replays of this table; another table's trials would add to it. nan
            for a single replay.
        high: [m] upper end.
        quartiles: [2, m] over replays.
        hit_rate: [m] share of decisions with no regret above the floor.
        floor: the noise floor, averaged likewise.
        tau: Kendall's tau on the budgets' lines at the end, averaged likewise; nan without a surface.
        replays: [seeds, m] regret above the floor of every seed's replays, averaged over budgets.
    """

    name: str
    cost: Array
    mean: Array
    low: Array
    high: Array
    quartiles: Array
    hit_rate: Array
    floor: float
    tau: float
    replays: Array

    def behind(self, other: Curve, at: int) -> tuple[float, float, float]:
        """Return how much more regret than another strategy this one has at a grid point, and its 95 % interval.

        Replays of one seed observe and judge by the same trials, so differences are taken seed by seed, as
        far as both have them.
        """
        both = min(len(self.replays), len(other.replays))
        differences = self.replays[:both, at] - other.replays[:both, at]
        error = float(_error(differences[:, None])[0])
        mean = float(differences.mean())
        return mean, mean - error, mean + error

    def cost_to(self, points: float) -> float:
        """Return the least cost from which the mean regret above the floor stays at or below `points`; inf if never."""
        over = np.flatnonzero(~(self.mean <= points * POINT))
        if len(over) == 0:
            return float(self.cost[0])
        return float(self.cost[over[-1] + 1]) if over[-1] + 1 < len(self.cost) else float("inf")


def mean_curve(name: str, groups: Sequence[Sequence[Trace]], grid: Array, axis: Axis = "cost") -> Curve:
    """Average replays; up to the cost of its first trial a replay counts with its first decision.

    Args:
        name: the strategy.
        groups: replays by seed; those of one seed (a budget each, say) are averaged first.
        grid: [m] costs, or times.
        axis: what the grid is of.
    """
    rows = np.array([np.mean([_at(trace.excess, trace, grid, axis) for trace in group], axis=0) for group in groups])
    hits = [np.mean([_at(_hits(trace), trace, grid, axis) for trace in group], axis=0) for group in groups]
    every = [trace for group in groups for trace in group]
    mean, error = rows.mean(axis=0), _error(rows)
    taus = [trace.tau for trace in every if np.isfinite(trace.tau)]
    return Curve(
        name, grid, mean, mean - error, mean + error, np.quantile(rows, [0.25, 0.75], axis=0), np.mean(hits, axis=0),
        float(np.mean([trace.floor.mean() for trace in every])), float(np.mean(taus)) if taus else float("nan"), rows,
    )  # fmt: skip


def _error(rows: Array) -> Array:
    """Return half the width of the mean's 95 % interval, [m]; nan where a single seed tells nothing of it."""
    count = len(rows)
    if count < 2:
        return np.full(rows.shape[1], np.nan)
    return float(student_t.ppf(0.975, count - 1)) * rows.std(axis=0, ddof=1) / np.sqrt(count)


def _hits(trace: Trace) -> Array:
    return (trace.regret <= trace.floor + 1e-12).mean(axis=1)


def _at(values: Array, trace: Trace, grid: Array, axis: Axis) -> Array:
    """Return a replay's values on the grid; nan where its probe alone costs more, or before its first decision."""
    along, begins = (trace.cost, trace.upfront) if axis == "cost" else (trace.time, trace.time[0])
    found = values[np.clip(np.searchsorted(along, grid, side="right") - 1, 0, None)]
    return np.where(grid < begins, np.nan, found)
