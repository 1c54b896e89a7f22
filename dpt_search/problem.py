"""What a strategy of a replay has to solve, what it has seen, and the ways of deciding from that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpt_search.blend import Blend
from dpt_search.config import RunConfig
from dpt_search.map_predictor import Array
from dpt_search.map_sampler import ratios
from dpt_search.posterior import Data, Hint
from dpt_search.walk_table import WalkTrial
from search_spaces.goals import Goal
from search_spaces.ratios import Cell, RatioSpace, spread, within

CostOf = Callable[[Cell], float]


@dataclass(frozen=True)
class Probe:
    """What an elastic probe of one seed says, in a replay.

    Attributes:
        accuracies: of each cell that the table of probes has.
        losses: of the same; None where that is not known.
        costs: of evaluating each.
        training: cost of the shared weights.
        length: of their training, in trials.
    """

    accuracies: dict[Cell, float]
    losses: dict[Cell, float] | None
    costs: dict[Cell, float]
    training: float
    length: float

    def said(self, cells: Sequence[Cell]) -> tuple[Array, Array | None]:
        """Return accuracies and losses of some cells; None for losses that are not known."""
        losses = None if self.losses is None else np.array([self.losses[cell] for cell in cells])
        return np.array([self.accuracies[cell] for cell in cells]), losses

    def evaluated(self, space: RatioSpace, budgets: Sequence[Goal]) -> list[Cell]:
        """Return the cells that a run evaluates by default, had it but those that the table of probes has."""
        reached = within(cell for budget in budgets for cell in budget.cells)
        return spread(space, (cell for cell in reached if cell in self.accuracies), RunConfig.probe_cells)


@dataclass(frozen=True)
class Problem:
    """What a strategy has to solve.

    Attributes:
        space: the lattice.
        budgets: what is to be decided, each with the cells it is decided among.
        cost: of one trial of a cell.
        seed: of all randomness.
        dense: the dense model's accuracy; None where that is not known.
        probe: what an elastic probe would say, and cost; None where that is not known.
        prior: [cells], an earlier run's surface; None without one.
        walks: the published walks as recorded; none where they are not known.
    """

    space: RatioSpace
    budgets: Sequence[Goal]
    cost: CostOf
    seed: int
    dense: float | None = None
    probe: Probe | None = None
    prior: Array | None = None
    walks: Sequence[WalkTrial] = ()


class Observed:
    """What a strategy has seen, and the ways of deciding from it."""

    def __init__(self, problem: Problem, degree: int) -> None:
        """
        Args:
            problem: what to solve.
            degree: of the polynomial in the posterior; 0 for none.
        """
        self._problem = problem
        self._degree = degree
        self._index = {cell: i for i, cell in enumerate(problem.space)}
        self._lines = [budget.cells for budget in problem.budgets]
        self._blend = Blend(ratios(problem.space), degree, dense=problem.dense)
        self._hints: Sequence[Hint] = ()
        self.cells: list[Cell] = []
        self.accuracies: list[float] = []

    def add(self, cell: Cell, accuracy: float) -> None:
        self.cells.append(cell)
        self.accuracies.append(accuracy)

    def means(self) -> dict[Cell, float]:
        """Return the mean accuracy of every observed cell."""
        known: dict[Cell, list[float]] = {}
        for cell, accuracy in zip(self.cells, self.accuracies, strict=True):
            known.setdefault(cell, []).append(accuracy)
        return {cell: float(np.mean(values)) for cell, values in known.items()}

    def take_hints(self, hints: Sequence[Hint]) -> None:
        """Let the posterior know earlier surfaces."""
        self._hints = tuple(hints)
        self._blend = Blend(ratios(self._problem.space), self._degree, hints, self._problem.dense)

    def posterior_mean(self) -> Array | None:
        """Return the posterior mean of every cell; None before the first observation."""
        if not self.cells:
            return None
        indices = np.array([self._index[cell] for cell in self.cells])
        return self._blend.posterior(Data.of(indices, np.array(self.accuracies))).mean

    def best_by_posterior(self) -> list[Cell]:
        """Return the feasible cell with the highest posterior mean for every budget.

        Before the first observation that is the highest of the first hint, or the middle where there is none.
        """
        mean = self.posterior_mean()
        if mean is None and self._hints:
            mean = self._hints[0].expectation
        if mean is None:
            return [line[len(line) // 2] for line in self._lines]
        return [max(line, key=lambda cell: mean[self._index[cell]]) for line in self._lines]

    def nearest_best(self) -> list[Cell]:
        """Return, per budget, where the best of the observed cells nearest to its line points to on it."""
        means = self.means()
        chosen = []
        for line in self._lines:
            if not means:
                chosen.append(line[len(line) // 2])
                continue
            best = min(means, key=lambda cell: (min(_steps(cell, other) for other in line), -means[cell]))
            chosen.append(min(line, key=lambda cell: _steps(cell, best)))
        return chosen

    def best_by_observation(self) -> list[Cell]:
        """Return the best observed cell of every budget's line; the middle of a line without an observation."""
        means = self.means()
        chosen = []
        for line in self._lines:
            seen = [cell for cell in line if cell in means]
            chosen.append(max(seen, key=lambda cell: means[cell]) if seen else line[len(line) // 2])
        return chosen


def _steps(one: Cell, other: Cell) -> int:
    """Return how many units one has to put back or take to get from one cell to another."""
    return abs(one.n_attn - other.n_attn) + abs(one.n_act - other.n_act)
