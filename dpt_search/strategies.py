"""Ways to search and to decide that `compare` sets against each other, around the samplers of a real search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from dpt_search.map_predictor import MapPredictor, NotIdentified
from dpt_search.map_sampler import MapSampler, published_walks, ratios
from dpt_search.posterior import Data, Surface
from dpt_search.samplers import cell_of, make_sampler, search_space
from search_spaces.budgets import Budget
from search_spaces.ratios import Cell, RatioSpace

CostOf = Callable[[Cell], float]


@dataclass(frozen=True)
class Problem:
    """What a strategy has to solve.

    Attributes:
        space: the lattice.
        budgets: what is to be decided.
        cost: of one trial of a cell.
        seed: of all randomness.
    """

    space: RatioSpace
    budgets: Sequence[Budget]
    cost: CostOf
    seed: int


class Strategy(Protocol):
    """Proposes cells, learns accuracies, and decides every budget at any time."""

    def ask(self) -> tuple[int, Cell] | None:
        """Return a token and the next cell; None when there is nothing left to try."""

    def tell(self, token: int, accuracy: float) -> None:
        """Learn the accuracy of an asked cell."""

    def choose(self) -> list[Cell]:
        """Return the cell that is believed best for every budget."""


class _Observed:
    """What a strategy has seen, and the two ways of deciding from it."""

    def __init__(self, problem: Problem, degree: int) -> None:
        self._problem = problem
        self._index = {cell: i for i, cell in enumerate(problem.space)}
        self._lines = [budget.feasible(problem.space) for budget in problem.budgets]
        self._surface = Surface(ratios(problem.space), degree)
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

    def best_by_posterior(self) -> list[Cell]:
        """Return the feasible cell with the highest posterior mean for every budget; at first the middle."""
        if not self.cells:
            return [line[len(line) // 2] for line in self._lines]
        indices = np.array([self._index[cell] for cell in self.cells])
        mean = self._surface.posterior(Data.of(indices, np.array(self.accuracies))).mean
        return [max(line, key=lambda cell: mean[self._index[cell]]) for line in self._lines]

    def best_by_observation(self) -> list[Cell]:
        """Return the best observed cell of every budget's line; the middle of a line without an observation."""
        means = self.means()
        chosen = []
        for line in self._lines:
            seen = [cell for cell in line if cell in means]
            chosen.append(max(seen, key=lambda cell: means[cell]) if seen else line[len(line) // 2])
        return chosen


class WholeSquare:
    """One study over the whole square for all budgets, decided by the posterior."""

    def __init__(self, problem: Problem, name: str, sampler: BaseSampler, degree: int = 2) -> None:
        """
        Args:
            problem: what to solve.
            name: the sampler's name.
            sampler: proposes.
            degree: of the polynomial in the posterior that decides; 0 for none.
        """
        self._problem, self._name = problem, name
        self._space = search_space(name, problem.space, problem.budgets)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._observed = _Observed(problem, degree)

    def ask(self) -> tuple[int, Cell] | None:
        trial = self._study.ask(self._space)
        return trial.number, cell_of(trial.params, self._problem.space, self._problem.budgets)

    def tell(self, token: int, accuracy: float) -> None:
        params = self._study.get_trials(deepcopy=False)[token].params
        self._study.tell(token, accuracy)
        self._observed.add(cell_of(params, self._problem.space, self._problem.budgets), accuracy)

    def choose(self) -> list[Cell]:
        return self._observed.best_by_posterior()


class LineByLine:
    """One study per budget on its line, in turn; each line is decided by its best observation.

    A cell that was tried is not tried again: the study is told what is known and asked anew.
    """

    ATTEMPTS = 30

    def __init__(self, problem: Problem, name: str) -> None:
        self._problem = problem
        self._studies = []
        for number, budget in enumerate(problem.budgets):
            sampler = make_sampler(name, problem.space, [budget], seed=problem.seed * 1009 + number)
            study = optuna.create_study(direction="maximize", sampler=sampler)
            self._studies.append((study, search_space(name, problem.space, [budget]), [budget]))
        self._observed = _Observed(problem, 0)
        self._asked: dict[int, tuple[optuna.Study, optuna.Trial, Cell]] = {}
        self._tried: set[Cell] = set()
        self._turn = self._token = 0

    def ask(self) -> tuple[int, Cell] | None:
        for _ in range(len(self._studies)):
            study, space, budgets = self._studies[self._turn % len(self._studies)]
            self._turn += 1
            found = self._new_cell(study, space, budgets)
            if found is not None:
                self._token += 1
                self._asked[self._token] = found
                return self._token, found[2]
        return None

    def _new_cell(
        self, study: optuna.Study, space: dict[str, optuna.distributions.BaseDistribution], budgets: list[Budget]
    ) -> tuple[optuna.Study, optuna.Trial, Cell] | None:
        line = budgets[0].feasible(self._problem.space)
        if self._tried.issuperset(line):
            return None
        means = self._observed.means()
        for _ in range(self.ATTEMPTS):
            trial = study.ask(space)
            cell = cell_of(trial.params, self._problem.space, budgets)
            if cell not in self._tried:
                self._tried.add(cell)
                return study, trial, cell
            if cell in means:
                study.tell(trial, means[cell])
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        cell = next(cell for cell in line if cell not in self._tried)
        self._tried.add(cell)
        # The sampler repeats itself: take a cell that is left; its result is known to the study as an added trial.
        params = {"n_attn": cell.n_attn} if "n_attn" in space else {"cell": line.index(cell)}
        study.enqueue_trial(params)
        return study, study.ask(space), cell

    def tell(self, token: int, accuracy: float) -> None:
        study, trial, cell = self._asked.pop(token)
        study.tell(trial, accuracy)
        self._observed.add(cell, accuracy)

    def choose(self) -> list[Cell]:
        return self._observed.best_by_observation()


class Walk:
    """The published procedure: single-kind and interleaved walks, one polynomial, its argmax; then nothing more."""

    def __init__(self, problem: Problem) -> None:
        self._observed = _Observed(problem, 2)
        self._problem = problem
        self._cells = published_walks(problem.space)
        self._asked: list[Cell] = []

    def ask(self) -> tuple[int, Cell] | None:
        if len(self._asked) == len(self._cells):
            return None
        self._asked.append(self._cells[len(self._asked)])
        return len(self._asked) - 1, self._asked[-1]

    def tell(self, token: int, accuracy: float) -> None:
        self._observed.add(self._asked[token], accuracy)

    def choose(self) -> list[Cell]:
        space, seen = self._problem.space, self._observed
        try:
            points = np.array([space.ratios(cell) for cell in seen.cells]).reshape(-1, 2)
            predictor = MapPredictor(points, np.array(seen.accuracies))
        except NotIdentified:
            return seen.best_by_observation()
        chosen = []
        for budget in self._problem.budgets:
            line = budget.feasible(space)
            mean, _ = predictor.predict(np.array([space.ratios(cell) for cell in line]))
            chosen.append(line[int(mean.argmax())])
        return chosen


def _map(problem: Problem) -> Strategy:
    return WholeSquare(problem, "map", MapSampler(problem.space, problem.budgets, problem.cost))


def _gp_lattice(problem: Problem) -> Strategy:
    sampler = MapSampler(problem.space, problem.budgets, problem.cost, degree=0)
    return WholeSquare(problem, "map", sampler, degree=0)


def _square(name: str) -> Callable[[Problem], Strategy]:
    def make(problem: Problem) -> Strategy:
        sampler = make_sampler(name, problem.space, problem.budgets, seed=problem.seed)
        return WholeSquare(problem, name, sampler)

    return make


def _lines(name: str) -> Callable[[Problem], Strategy]:
    return lambda problem: LineByLine(problem, name)


STRATEGIES: dict[str, Callable[[Problem], Strategy]] = {
    "map": _map,
    "gp-lattice": _gp_lattice,
    "walk": Walk,
    **{f"{name}/square": _square(name) for name in ("tpe", "gp", "cmaes", "qmc", "random", "grid")},
    **{f"{name}/lines": _lines(name) for name in ("tpe", "gp", "cmaes", "qmc", "random", "grid")},
}
"""Every strategy by name. `/square`: one study for all budgets; `/lines`: one study per budget."""
