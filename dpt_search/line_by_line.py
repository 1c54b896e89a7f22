"""Pure search at its best on lines: one study per budget, duplicates skipped."""

from __future__ import annotations

import optuna

from dpt_search.map_predictor import Array
from dpt_search.problem import Observed, Problem
from dpt_search.samplers import cell_of, make_sampler, search_space
from search_spaces.goals import Goal
from search_spaces.ratios import Cell


class LineByLine:
    """One study per budget on its line, in turn; each line is decided by its best observation.

    A cell that was tried is not tried again: the study is told what is known and asked anew.
    """

    ATTEMPTS = 30

    def __init__(self, problem: Problem, name: str, startup: int) -> None:
        """
        Args:
            problem: what to solve.
            name: the sampler's name.
            startup: random trials of each study before its model counts, for samplers that have one.
        """
        self._problem = problem
        self.upfront = 0.0
        self._studies = []
        for number, budget in enumerate(problem.budgets):
            sampler = make_sampler(name, problem.space, [budget], seed=problem.seed * 1009 + number, startup=startup)
            study = optuna.create_study(direction="maximize", sampler=sampler)
            self._studies.append((study, search_space(name, problem.space, [budget]), [budget]))
        self._observed = Observed(problem, 0)
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
        self, study: optuna.Study, space: dict[str, optuna.distributions.BaseDistribution], budgets: list[Goal]
    ) -> tuple[optuna.Study, optuna.Trial, Cell] | None:
        line = budgets[0].cells
        if self._tried.issuperset(line):
            return None
        means = self._observed.means()
        for _ in range(self.ATTEMPTS):
            trial = study.ask(space)
            cell = cell_of(trial.params, budgets)
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
        study.enqueue_trial({"cell": line.index(cell)})
        return study, study.ask(space), cell

    def tell(self, token: int, accuracy: float) -> None:
        study, trial, cell = self._asked.pop(token)
        study.tell(trial, accuracy)
        self._observed.add(cell, accuracy)

    def choose(self) -> list[Cell]:
        return self._observed.best_by_observation()

    def take_probe(self) -> None:
        """There is none."""

    def surface(self) -> Array | None:
        return None
