"""Searchers replayed over tables of real surfaces, with a virtual clock and asynchronous workers.

A replay observes the values of one seed and is judged on the mean of the others, so memorising noise earns nothing.
Which of a cell's trials is whose seed means nothing, because no two trials share a seed: once every seed of the table
was the observed one, the trials of every cell are dealt anew, so that many replays are as many different ones.
Cost is counted as trials end; the noise floor is the regret of deciding by all that the replay could have observed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import kendalltau

from dpt_search.map_predictor import Array
from dpt_search.probe_seeds import ProbeSeeds
from dpt_search.problem import Probe, Problem
from dpt_search.strategies import STRATEGIES
from dpt_search.surface_table import SurfaceTable
from dpt_search.walk_table import WalkTrial
from search_spaces.goals import Goal
from search_spaces.ratios import Cell

POINT = 0.01
_PROBE = -1
"""Token of the probe among the running trials."""


@dataclass(frozen=True)
class Trace:
    """One replay, after every finished trial.

    Attributes:
        cost: [n] cost of all trials finished so far, in trials of the dense model.
        time: [n] virtual time, in the same unit.
        regret: [n, budgets] accuracy lost by what would be chosen, in units of accuracy.
        floor: [budgets] the noise floor.
        tau: Kendall's tau between the surface believed in at the end and the true one, mean over the budgets' lines;
            nan where the strategy believes in none.
        upfront: cost of a probe, which is in `cost` from the start.
    """

    cost: Array
    time: Array
    regret: Array
    floor: Array
    tau: float
    upfront: float = 0.0

    @property
    def excess(self) -> Array:
        """[n] regret above the noise floor, averaged over the budgets."""
        return (self.regret - self.floor).mean(axis=1)


class Judge:
    """What a replay observes, and what its decisions are worth."""

    def __init__(
        self, table: SurfaceTable, budgets: Sequence[Goal], seed: int, probes: ProbeSeeds | None = None
    ) -> None:
        """
        Args:
            table: the surface; at least two seeds.
            budgets: what is decided.
            seed: of the replay; the observed column rotates with it and the trials are dealt anew after every round,
                the probe changes with every round.
            probes: what the probe says, with several seeds; None where that is not known.
        """
        if table.accuracies.shape[1] < 2:
            raise ValueError("a table needs at least two seeds: one is observed, the others judge")
        # Seeds that only some cells have, judge but are not observed first.
        seeds = int((np.isfinite(table.accuracies).mean(axis=0) > 0.5).sum())
        self._round, self._observed = divmod(seed, seeds)
        self._table = table = dealt(table, self._round)
        known = np.isfinite(table.accuracies).any(axis=1)
        self._index = {cell: i for i, cell in enumerate(table.cells) if known[i]}
        self._random = np.random.default_rng([seed, 1])
        others = np.delete(table.accuracies, self._observed, axis=1)
        self._truth = np.nanmean(others, axis=1)
        self.noise = table_noise(table)
        self.probe = self._probe(probes, seed) if probes is not None else None
        self._drawn: dict[Cell, list[int]] = {}
        self._lines = [self._judged(budget) for budget in budgets]
        seen = table.accuracies[:, self._observed]
        seen = np.where(np.isfinite(seen), seen, np.nanmean(table.accuracies, axis=1))
        self.floor = np.array([self._lost(line, line[int(np.argmax(seen[line]))]) for line in self._lines])

    def _judged(self, budget: Goal) -> np.ndarray:
        """Return the cells of a budget's line whose worth the other seeds tell."""
        known = (self._index[c] for c in budget.cells if c in self._index)
        line = np.array([i for i in known if np.isfinite(self._truth[i])], dtype=np.int64)
        if not len(line):
            raise ValueError(f"the table has too few trials of {budget} to judge by")
        return line

    def _probe(self, probes: ProbeSeeds, seed: int) -> Probe:
        dense = self._table.costs[self._index[Cell(0, 0)]]
        # Not in step with the observed column: every pair of both comes in turn.
        chosen = (seed + self._round) % probes.accuracies.shape[1]
        losses = None if probes.losses is None else _by_cell(probes, probes.losses[:, chosen])
        return Probe(
            _by_cell(probes, probes.accuracies[:, chosen]),
            losses,
            _by_cell(probes, probes.costs / dense),
            probes.training_cost / dense,
            probes.epochs / (self._table.trial_epochs or probes.epochs),
        )

    def tau(self, surface: Array | None) -> float:
        """Return Kendall's tau between a surface, [cells of the space], and the true one, mean over the lines."""
        if surface is None:
            return float("nan")
        position = {cell: i for i, cell in enumerate(self._table.space)}
        believed = surface[[position[cell] for cell in self._table.cells]]
        taus = [kendalltau(believed[line], self._truth[line])[0] for line in self._lines if len(line) > 1]
        return float(np.nanmean(taus)) if taus else float("nan")

    def observe(self, cell: Cell) -> float:
        """Return a trial's accuracy: the observed seed's, then that of a seed not drawn yet, then noisy means.

        A cell that the table lacks has the mean of its neighbours, with the noise of one trial.
        """
        if cell not in self._index:
            near = self._near(cell)
            lost = self.noise * np.sqrt(1 - 1 / len(near))
            values = self._table.accuracies[near]
            own = values[:, self._observed]
            seen = float(np.nanmean(np.where(np.isfinite(own), own, np.nanmean(values, axis=1))))
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
        costs = self._table.costs[self._near(cell)]
        known = costs[np.isfinite(costs)] if np.isfinite(costs).any() else self._table.costs
        return float(np.nanmean(known) / self._table.costs[self._index[Cell(0, 0)]])

    def _near(self, cell: Cell) -> list[int]:
        """Return the index of a cell, or of those nearest to it where the table lacks it."""
        if cell in self._index:
            return [self._index[cell]]
        away = {i: abs(c.n_attn - cell.n_attn) + abs(c.n_act - cell.n_act) for c, i in self._index.items()}
        nearest = min(away.values())
        return [i for i, distance in away.items() if distance == nearest]

    def regret(self, chosen: Sequence[Cell]) -> Array:
        """Return what each budget's choice, or its nearest cell in the table, loses against the best one, [budgets]."""
        lost = [self._lost(line, self._nearest(line, cell)) for line, cell in zip(self._lines, chosen, strict=True)]
        return np.array(lost)

    def _nearest(self, line: np.ndarray, cell: Cell) -> int:
        return int(min(line, key=lambda i: abs(self._table.cells[i].n_attn - cell.n_attn)))

    def _lost(self, line: np.ndarray, index: int) -> float:
        return float(self._truth[line].max() - self._truth[index])


def _by_cell(probes: ProbeSeeds, values: Array) -> dict[Cell, float]:
    return dict(zip(probes.cells, values.tolist(), strict=True))


def dealt(table: SurfaceTable, times: int) -> SurfaceTable:
    """Return the table with every cell's trials in another order, a different one for every number; 0 leaves it."""
    if times == 0:
        return table
    generator, accuracies = np.random.default_rng([times, 2]), table.accuracies.copy()
    for row in accuracies:
        known = np.flatnonzero(np.isfinite(row))
        row[known] = row[generator.permutation(known)]
    return replace(table, accuracies=accuracies)


def table_noise(table: SurfaceTable) -> float:
    """Return the standard deviation of one trial about its cell's mean, pooled over the cells."""
    counts = np.isfinite(table.accuracies).sum(axis=1)
    many = counts > 1
    variances = np.nanvar(table.accuracies[many], axis=1, ddof=1)
    return float(np.sqrt(np.average(variances, weights=counts[many] - 1)))


def replay(
    table: SurfaceTable,
    name: str,
    budgets: Sequence[Goal],
    *,
    seed: int,
    workers: int,
    max_trials: int,
    probes: ProbeSeeds | None = None,
    prior: Array | None = None,
    walks: Sequence[Sequence[WalkTrial]] = (),
) -> Trace:
    """Run a strategy against a table.

    A probe takes one of the workers, from the start; its whole cost counts from the first trial on.

    Args:
        table: the surface.
        name: key of `STRATEGIES`.
        budgets: what is decided.
        seed: of the strategy and of what it observes.
        workers: trials at a time.
        max_trials: number of trials.
        probes: what the probe says.
        prior: [cells], an earlier run's surface, for the strategies that take one.
        walks: the published walks as recorded, by seed; replays take one in turn.
    """
    judge = Judge(table, budgets, seed, probes)
    walked = walks[seed % len(walks)] if walks else ()
    strategy = STRATEGIES[name](
        Problem(table.space, budgets, judge.cost, seed, table.dense, judge.probe, prior, walked)
    )
    running: list[tuple[float, int, Cell]] = []
    costs, times, regrets = [], [], []
    asked, spent, now = 0, strategy.upfront, 0.0
    if strategy.upfront:
        heapq.heappush(running, (strategy.upfront, _PROBE, Cell(0, 0)))
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
        if token == _PROBE:
            strategy.take_probe()
        else:
            spent += judge.cost(cell)
            strategy.tell(token, judge.observe(cell))
        costs.append(spent)
        times.append(now)
        regrets.append(judge.regret(strategy.choose()))
    tau = judge.tau(strategy.surface())
    return Trace(np.array(costs), np.array(times), np.array(regrets), judge.floor, tau, strategy.upfront)
