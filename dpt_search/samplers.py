"""Every sampler by name: this product's own and Optuna's, behind one interface."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from dpt_search.map_sampler import MapSampler
from dpt_search.posterior import Hint
from search_spaces.goals import Goal
from search_spaces.ratios import Cell, RatioSpace

_Make = Callable[[int, int], BaseSampler]
"""Makes a sampler from a seed and a number of random trials before its model counts, where it has one."""


def _tpe(seed: int, startup: int) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)


def _gp(seed: int, startup: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)


def _cmaes(seed: int, startup: int) -> BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=1, warn_independent_sampling=False)


def _qmc(seed: int, startup: int) -> BaseSampler:
    return optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)


def _random(seed: int, startup: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _grid(seed: int, startup: int) -> BaseSampler:
    # Unlike GridSampler it knows what was tried by its parameters, so that a rebuilt study repeats nothing.
    return optuna.samplers.BruteForceSampler(seed=seed, avoid_premature_stop=False)


PURE: dict[str, _Make] = {
    "tpe": _tpe, "gp": _gp, "cmaes": _cmaes, "qmc": _qmc, "random": _random, "grid": _grid,
}  # fmt: skip
"""Optuna's samplers by name."""

_SEQUENCES = ("qmc",)
"""Samplers that walk one sequence fixed by their seed, rather than drawing anew for every trial."""


def candidate_cells(budgets: Sequence[Goal]) -> list[Cell]:
    """Return the cells among which any of the budgets is decided, sorted."""
    return sorted({cell for budget in budgets for cell in budget.cells})


def search_space(name: str, space: RatioSpace, budgets: Sequence[Goal]) -> dict[str, BaseDistribution]:
    """Return the parameters a sampler proposes: as few as the budgets allow it.

    Args:
        name: the sampler.
        space: the lattice.
        budgets: what the search has to decide.

    Returns:
        `map`: n_attn and n_act. `grid`: the index of a candidate cell. The others: that on the line of a single budget,
        n_attn and n_act for several.
    """
    if _is_indexed(name, budgets):
        return {"cell": IntDistribution(0, len(candidate_cells(budgets)) - 1)}
    return {"n_attn": IntDistribution(0, space.n_attn), "n_act": IntDistribution(0, space.n_act)}


def _is_indexed(name: str, budgets: Sequence[Goal]) -> bool:
    return name == "grid" or (name != "map" and len(budgets) == 1)


def cell_of(params: dict[str, int], budgets: Sequence[Goal]) -> Cell:
    """Translate what a sampler proposed into a cell."""
    if "cell" in params:
        return candidate_cells(budgets)[params["cell"]]
    return Cell(params["n_attn"], params["n_act"])


def params_of(cell: Cell, name: str, space: RatioSpace, budgets: Sequence[Goal]) -> dict[str, int] | None:
    """Translate a cell into what a sampler would have proposed; None when it could not have."""
    if _is_indexed(name, budgets):
        cells = candidate_cells(budgets)
        return {"cell": cells.index(cell)} if cell in cells else None
    return {"n_attn": cell.n_attn, "n_act": cell.n_act} if cell in space else None


def make_sampler(
    name: str,
    space: RatioSpace,
    budgets: Sequence[Goal],
    *,
    seed: int,
    cost: Callable[[Cell], float] = lambda cell: 1.0,
    design: str = "lines",
    hints: Callable[[], Sequence[Hint]] = tuple,
    dense: float | None = None,
    startup: int = 4,
) -> BaseSampler:
    """Make a sampler whose randomness is a function of the seed and the trial's number.

    Args:
        name: `map` or one of `PURE`.
        space: the lattice.
        budgets: what the search has to decide.
        seed: the run's seed.
        cost: of one trial of a cell, in any unit; `map` alone looks at it.
        design: what `map` tries first.
        hints: earlier surfaces as `MapSampler` takes them; `map` alone looks at them.
        dense: the dense model's accuracy; `map` alone looks at it.
        startup: random trials before the models of `tpe` and `gp` count.
    """
    if name == "map":
        return MapSampler(space, budgets, cost, design=design, hints=hints, dense=dense)
    return _Seeded(PURE[name], seed, startup, is_sequence=name in _SEQUENCES)


class _Seeded(BaseSampler):
    """Draws every trial from a generator of its own, so that a search rebuilt from its log goes on as it would have."""

    def __init__(self, make: _Make, seed: int, startup: int, *, is_sequence: bool) -> None:
        self._make, self._seed, self._startup, self._is_sequence = make, seed, startup, is_sequence
        self._sampler = self._new(seed)
        self._drawn = 0

    def _new(self, seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            # multivariate and constant_liar are marked experimental.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return self._make(seed, self._startup)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        if not self._is_sequence:
            state = np.random.SeedSequence([self._seed, trial.number]).generate_state(1)
            self._sampler = self._new(int(state[0]))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._is_sequence and search_space:
            # A sequence starts at its beginning in every process: skip what earlier trials took.
            while self._drawn < trial.number:
                self._sampler.sample_relative(study, trial, search_space)
                self._drawn += 1
            self._drawn += 1
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        # The grid would stop the study once it is exhausted; how many trials there are is not a sampler's to decide.
        if not isinstance(self._sampler, optuna.samplers.BruteForceSampler):
            self._sampler.after_trial(study, trial, state, values)
