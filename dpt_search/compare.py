"""Searchers replayed over tables of real surfaces, with a virtual clock and asynchronous workers.

A replay observes the values of one seed and is judged on the mean of the others, so memorising noise earns nothing.
Cost is counted as trials end; the noise floor is the regret of deciding by all that the replay could have observed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpt_search.map_predictor import Array
from dpt_search.strategies import STRATEGIES, Problem
from dpt_search.surface_table import SurfaceTable
from search_spaces.budgets import Budget
from search_spaces.ratios import Cell

POINT = 0.01


@dataclass(frozen=True)
class Trace:
    """One replay, after every finished trial.

    Attributes:
        cost: [n] cost of all trials finished so far, in trials of the dense model.
        time: [n] virtual time, in the same unit.
        regret: [n, budgets] accuracy lost by what would be chosen, in units of accuracy.
        floor: [budgets] the noise floor.
    """

    cost: Array
    time: Array
    regret: Array
    floor: Array

    @property
    def excess(self) -> Array:
        """[n] regret above the noise floor, averaged over the budgets."""
        return (self.regret - self.floor).mean(axis=1)


class Judge:
    """What a replay observes, and what its decisions are worth."""

    def __init__(self, table: SurfaceTable, budgets: Sequence[Budget], seed: int) -> None:
        """
        Args:
            table: the surface; at least two seeds.
            budgets: what is decided.
            seed: of the replay; the observed column rotates with it.
        """
        seeds = table.accuracies.shape[1]
        if seeds < 2:
            raise ValueError("a table needs at least two seeds: one is observed, the others judge")
        self._table, self._index = table, {cell: i for i, cell in enumerate(table.cells)}
        self._random = np.random.default_rng([seed, 1])
        self._observed = seed % seeds
        others = np.delete(table.accuracies, self._observed, axis=1)
        self._truth = np.nanmean(others, axis=1)
        self.noise = table_noise(table)
        self._drawn: dict[Cell, list[int]] = {}
        self._lines = [np.array([self._index[c] for c in b.feasible(table.space) if c in self._index]) for b in budgets]
        seen = table.accuracies[:, self._observed]
        self.floor = np.array([self._lost(line, line[int(np.argmax(seen[line]))]) for line in self._lines])

    def observe(self, cell: Cell) -> float:
        """Return a trial's accuracy: the observed seed's, then that of a seed not drawn yet, then noisy means.

        A cell that the table lacks has the mean of its neighbours, with the noise of one trial.
        """
        if cell not in self._index:
            near = self._near(cell)
            lost = self.noise * np.sqrt(1 - 1 / len(near))
            seen = float(np.mean(self._table.accuracies[near, self._observed]))
            return seen + float(lost * self._random.standard_normal())
        row = self._table.accuracies[self._index[cell]]
        drawn = self._drawn.setdefault(cell, [])
        left = [s for s in range(len(row)) if s not in drawn and np.isfinite(row[s])]
        if not left:
            return float(np.nanmean(row) + self.noise * self._random.standard_normal())
        chosen = self._observed if self._observed in left else int(self._random.choice(left))
        drawn.append(chosen)
        return float(row[chosen])

    def cost(self, cell: Cell) -> float:
        """Return a trial's cost, in trials of the dense model."""
        return float(np.mean(self._table.costs[self._near(cell)]) / self._table.costs[self._index[Cell(0, 0)]])

    def _near(self, cell: Cell) -> list[int]:
        """Return the index of a cell, or of its neighbours where the table lacks it."""
        if cell in self._index:
            return [self._index[cell]]
        return [i for c, i in self._index.items() if abs(c.n_attn - cell.n_attn) + abs(c.n_act - cell.n_act) == 1]

    def regret(self, chosen: Sequence[Cell]) -> Array:
        """Return what each budget's choice, or its nearest cell in the table, loses against the best one, [budgets]."""
        lost = [self._lost(line, self._nearest(line, cell)) for line, cell in zip(self._lines, chosen, strict=True)]
        return np.array(lost)

    def _nearest(self, line: np.ndarray, cell: Cell) -> int:
        return int(min(line, key=lambda i: abs(self._table.cells[i].n_attn - cell.n_attn)))

    def _lost(self, line: np.ndarray, index: int) -> float:
        return float(self._truth[line].max() - self._truth[index])


def table_noise(table: SurfaceTable) -> float:
    """Return the standard deviation of one trial about its cell's mean, pooled over the cells."""
    counts = np.isfinite(table.accuracies).sum(axis=1)
    many = counts > 1
    variances = np.nanvar(table.accuracies[many], axis=1, ddof=1)
    return float(np.sqrt(np.average(variances, weights=counts[many] - 1)))


def replay(
    table: SurfaceTable, name: str, budgets: Sequence[Budget], *, seed: int, workers: int, max_trials: int
) -> Trace:
    """Run one strategy over a table.

    Args:
        table: the surface.
        name: one of `STRATEGIES`.
        budgets: what is decided.
        seed: of the strategy and of what it observes.
        workers: trials at a time.
        max_trials: number of trials.
    """
    judge = Judge(table, budgets, seed)
    strategy = STRATEGIES[name](Problem(table.space, budgets, judge.cost, seed))
    running: list[tuple[float, int, Cell]] = []
    costs, times, regrets = [], [], []
    asked, spent, now = 0, 0.0, 0.0
    while True:
        while len(running) < workers and asked < max_trials:
            found = strategy.ask()
            if found is None:
                break
            heapq.heappush(running, (now + judge.cost(found[1]), found[0], found[1]))
            asked += 1
        if not running:
            break
        now, token, cell = heapq.heappop(running)
        spent += judge.cost(cell)
        strategy.tell(token, judge.observe(cell))
        costs.append(spent)
        times.append(now)
        regrets.append(judge.regret(strategy.choose()))
    return Trace(np.array(costs), np.array(times), np.array(regrets), judge.floor)


@dataclass(frozen=True)
class Curve:
    """The mean of many replays of one strategy.

    Attributes:
        name: the strategy.
        cost: [m] common grid of cost.
        mean: [m] regret above the floor, averaged over budgets and replays.
        low: [m] lower end of its 95 % interval, over replays.
        high: [m] upper end.
        quartiles: [2, m] over replays.
        hit_rate: [m] share of decisions with no regret above the floor.
    """

    name: str
    cost: Array
    mean: Array
    low: Array
    high: Array
    quartiles: Array
    hit_rate: Array

    def cost_to(self, points: float) -> float:
        """Return the least cost from which the mean regret above the floor stays at or below `points`; inf if never."""
        over = np.flatnonzero(~(self.mean <= points * POINT))
        if len(over) == 0:
            return float(self.cost[0])
        return float(self.cost[over[-1] + 1]) if over[-1] + 1 < len(self.cost) else float("inf")


def curve(name: str, traces: Sequence[Trace], grid: Array) -> Curve:
    """Average replays on a grid of cost; before a replay's first trial it counts with its first decision."""
    rows, hits = [], []
    for trace in traces:
        at = np.clip(np.searchsorted(trace.cost, grid, side="right") - 1, 0, None)
        rows.append(trace.excess[at])
        hits.append((trace.regret <= trace.floor + 1e-12).mean(axis=1)[at])
    values = np.array(rows)
    error = 1.96 * values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros(len(grid))
    mean = values.mean(axis=0)
    return Curve(
        name, grid, mean, mean - error, mean + error, np.quantile(values, [0.25, 0.75], axis=0), np.mean(hits, axis=0)
    )


def compare(
    table: SurfaceTable,
    names: Sequence[str],
    budgets: Sequence[Budget],
    *,
    seeds: int,
    workers: int,
    max_trials: int,
) -> list[Curve]:
    """Replay every strategy with every seed, on one grid of cost."""
    grid = np.arange(1.0, max_trials + 1.0)
    curves = []
    for name in names:
        traces = [
            replay(table, name, budgets, seed=seed, workers=workers, max_trials=max_trials) for seed in range(seeds)
        ]
        curves.append(curve(name, traces, grid))
    return curves
