"""What a search is told, and the Optuna study that its trial log makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from dpt_search.allowance import Allowance
from dpt_search.observed import surface_trials
from dpt_search.store import TrialLog
from search_spaces.plan import PruningPlan, Ranking
from search_spaces.ratios import Cell


@dataclass(frozen=True)
class SearchPlan:
    """What a search is told.

    Attributes:
        name: the sampler's name, for the record.
        sampler: proposes values of `distributions`.
        distributions: the study's parameters.
        cell_of: translates proposed values into a cell.
        params_of: translates a cell into values; None when the parameters cannot express it.
        ranking: translates a cell into a plan.
        seed: the run's seed; a trial's is this plus its number.
        max_trials: number of trials in all, recorded ones counted.
        max_failures: failed trials in a row that stop the search.
        start: name of the weights that every trial starts from.
        deadline: clock time (seconds since the epoch) after which nothing is proposed.
        allowance: what the trials and the probe may cost; None for no limit.
    """

    name: str
    sampler: optuna.samplers.BaseSampler
    distributions: dict[str, BaseDistribution]
    cell_of: Callable[[dict[str, int]], Cell]
    params_of: Callable[[Cell], dict[str, int] | None]
    ranking: Ranking
    seed: int
    max_trials: int
    max_failures: int
    start: str = "dense"
    deadline: float = math.inf
    allowance: Allowance | None = None


def params_of_plan(plan: SearchPlan, removed: str) -> dict[str, int] | None:
    """Return what the study calls a plan; None for one that is not the ranking's, or does not fit the parameters."""
    parsed = PruningPlan.parse(removed)
    return plan.params_of(parsed.cell) if parsed in plan.ranking else None


def study_storage(plan: SearchPlan, log: TrialLog) -> optuna.storages.InMemoryStorage:
    """Return a storage whose study `search` holds every trial that tells of the surface and fits the parameters."""
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="search", direction="maximize", sampler=plan.sampler)
    for finished in surface_trials(log, plan.ranking):
        params = params_of_plan(plan, finished.plan)
        if params is None:
            continue
        state = TrialState.FAIL if finished.accuracy is None else TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                state=state, value=finished.accuracy, params=params, distributions=plan.distributions
            )
        )
    return storage
