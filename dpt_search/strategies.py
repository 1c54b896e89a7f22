"""Ways to search and to decide that `compare` sets against each other, around the samplers of a real search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from dpt_search.config import RunConfig
from dpt_search.hints import smooth
from dpt_search.line_by_line import LineByLine
from dpt_search.map_predictor import Array, MapPredictor, NotIdentified
from dpt_search.map_sampler import MapSampler, published_walks, ratios
from dpt_search.posterior import Hint
from dpt_search.problem import Observed, Problem
from dpt_search.samplers import PURE, cell_of, make_sampler, search_space
from dpt_search.walk_table import WalkTrial
from search_spaces.ratios import Cell


class Strategy(Protocol):
    """Proposes cells, learns accuracies, and decides every budget at any time."""

    upfront: float
    """Cost of a probe that it runs beside its first trials, and knows the outcome of after `take_probe`."""

    def take_probe(self) -> None:
        """Learn what the probe found."""

    def ask(self) -> tuple[int, Cell] | None:
        """Return a token and the next cell; None when there is nothing left to try."""

    def tell(self, token: int, accuracy: float) -> None:
        """Learn the accuracy of an asked cell."""

    def choose(self) -> list[Cell]:
        """Return the cell that is believed best for every budget."""

    def surface(self) -> Array | None:
        """Return the accuracies that it believes in, [cells of the space]; None where it has no such belief."""


class WholeSquare:
    """One study over the whole square for all budgets."""

    def __init__(
        self, problem: Problem, name: str, sampler: BaseSampler, degree: int = 2, *, decide: str = "posterior"
    ) -> None:
        """
        Args:
            problem: what to solve.
            name: the sampler's name.
            sampler: proposes.
            degree: of the polynomial in the posterior that decides; 0 for none.
            decide: `posterior`, or `nearest` for the observation nearest to each line.
        """
        self._problem, self._name, self._decide = problem, name, decide
        self._space = search_space(name, problem.space, problem.budgets)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._observed = Observed(problem, degree)
        self.upfront = 0.0

    def take_probe(self) -> None:
        """There is none."""

    def ask(self) -> tuple[int, Cell] | None:
        trial = self._study.ask(self._space)
        return trial.number, cell_of(trial.params, self._problem.budgets)

    def tell(self, token: int, accuracy: float) -> None:
        params = self._study.get_trials(deepcopy=False)[token].params
        self._study.tell(token, accuracy)
        self._observed.add(cell_of(params, self._problem.budgets), accuracy)

    def choose(self) -> list[Cell]:
        return self._observed.best_by_posterior() if self._decide == "posterior" else self._observed.nearest_best()

    def surface(self) -> Array | None:
        return self._observed.posterior_mean() if self._decide == "posterior" else None


class Hinted(WholeSquare):
    """`map` as a run has it: the whole square, a probe beside the first trials, the surfaces of earlier runs."""

    def __init__(self, problem: Problem, probe_max_cost: float, *, prior: bool = False) -> None:
        """
        Args:
            problem: what to solve; may know of a probe.
            probe_max_cost: in trials of the dense model; a probe that costs more is left out.
            prior: whether it knows the problem's earlier surface.
        """
        self._hints: list[Hint] = [Hint(problem.prior)] if prior and problem.prior is not None else []
        sampler = MapSampler(
            problem.space, problem.budgets, problem.cost, hints=lambda: tuple(self._hints), dense=problem.dense
        )
        super().__init__(problem, "map", sampler)
        self._observed.take_hints(self._hints)
        self._cells: list[Cell] = []
        if problem.probe is not None:
            self._cells = problem.probe.evaluated(problem.space, problem.budgets)
            cost = problem.probe.training + sum(problem.probe.costs[cell] for cell in self._cells)
            self.upfront = cost if cost <= probe_max_cost * problem.cost(Cell(0, 0)) else 0.0

    def take_probe(self) -> None:
        probe = self._problem.probe
        assert probe is not None
        found = smooth(self._problem.space, self._cells, *probe.said(self._cells), probe.length)
        self._hints = [found, *self._hints]
        self._observed.take_hints(self._hints)


class Walk:
    """The published procedure: single-kind and interleaved walks, one polynomial, its argmax; then nothing more."""

    def __init__(self, problem: Problem) -> None:
        self._observed = Observed(problem, 2)
        self._problem = problem
        self.upfront = 0.0
        self._cells = published_walks(problem.space)
        self._asked: list[Cell] = []

    def ask(self) -> tuple[int, Cell] | None:
        if len(self._asked) == len(self._cells):
            return None
        self._asked.append(self._cells[len(self._asked)])
        return len(self._asked) - 1, self._asked[-1]

    def tell(self, token: int, accuracy: float) -> None:
        self._observed.add(self._asked[token], accuracy)

    def take_probe(self) -> None:
        """There is none."""

    def choose(self) -> list[Cell]:
        space, mean = self._problem.space, self.surface()
        if mean is None:
            return self._observed.best_by_observation()
        index = {cell: i for i, cell in enumerate(space)}
        lines = (budget.cells for budget in self._problem.budgets)
        return [max(line, key=lambda cell: mean[index[cell]]) for line in lines]

    def surface(self) -> Array | None:
        seen = self._observed
        try:
            points = np.array([self._problem.space.ratios(cell) for cell in seen.cells]).reshape(-1, 2)
            return MapPredictor(points, np.array(seen.accuracies)).predict(ratios(self._problem.space))[0]
        except NotIdentified:
            return None


class InheritedWalk(Walk):
    """The published procedure as it was published: every trial starts from the weights of the one before it.

    What it is told of its trials is what was recorded of them, because a trial of the table starts anew.
    """

    def __init__(self, problem: Problem) -> None:
        """
        Args:
            problem: what to solve; knows of recorded walks.

        Raises:
            ValueError: it knows of none.
        """
        super().__init__(problem)
        if not problem.walks:
            raise ValueError("no recorded walks lie beside the table: `dpt-search tabulate RUN --walks` makes them")
        self._waiting = list(problem.walks)
        self._begun: list[WalkTrial] = []
        self._done: set[str | None] = {None}

    def ask(self) -> tuple[int, Cell] | None:
        ready = next((trial for trial in self._waiting if trial.start_trial in self._done), None)
        if ready is None:
            return None
        self._waiting.remove(ready)
        self._begun.append(ready)
        return len(self._begun) - 1, ready.cell

    def tell(self, token: int, accuracy: float) -> None:
        trial = self._begun[token]
        self._done.add(trial.trial)
        self._observed.add(trial.cell, trial.accuracy)


def _gp_lattice(problem: Problem) -> Strategy:
    sampler = MapSampler(problem.space, problem.budgets, problem.cost, degree=0, dense=problem.dense)
    return WholeSquare(problem, "map", sampler, degree=0)


def _square(name: str, decide: str) -> Callable[[Problem], Strategy]:
    def make(problem: Problem) -> Strategy:
        sampler = make_sampler(name, problem.space, problem.budgets, seed=problem.seed)
        return WholeSquare(problem, name, sampler, decide=decide)

    return make


def _lines(name: str, startup: int) -> Callable[[Problem], Strategy]:
    return lambda problem: LineByLine(problem, name, startup)


INHERITED = "walk/inherited"
"""The strategy that needs recorded walks beside the table."""

STRATEGIES: dict[str, Callable[[Problem], Strategy]] = {
    "map": lambda problem: Hinted(problem, RunConfig.probe_max_cost),
    "map/probe": lambda problem: Hinted(problem, math.inf),
    "map/no-probe": lambda problem: Hinted(problem, 0.0),
    "map/prior": lambda problem: Hinted(problem, 0.0, prior=True),
    "gp-lattice": _gp_lattice,
    "walk": Walk,
    INHERITED: InheritedWalk,
    **{f"{name}/square": _square(name, "posterior") for name in PURE},
    **{f"{name}/nearest": _square(name, "nearest") for name in PURE},
    **{f"{name}/lines": _lines(name, 4) for name in PURE},
    **{f"{name}/lines@{startup}": _lines(name, startup) for name in ("tpe", "gp") for startup in (2, 10)},
}
"""Every strategy by name. `gp-lattice`, `map/no-probe` and `map/probe` each add one thing to the one before; `map` is
what a run does by default, without a probe that is too dear. Pure searches: `/square`, one study for all budgets,
decided by the posterior; `/nearest`, decided by the observation nearest to each line; `/lines`, one study per budget
(@N: with N start-up trials)."""
