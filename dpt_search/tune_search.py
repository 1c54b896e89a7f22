"""The search on Ray Tune: proposals from an Optuna sampler, every one of them recorded before it runs."""

from __future__ import annotations

import math
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from dpt_search.allowance import Allowance
from dpt_search.observed import ended, searched, surface_trials, unfinished
from dpt_search.store import Finished, Proposed, RunStore, TrialLog
from dpt_search.waiting import Waiting
from dpt_search.waiting_trials import WaitingTrials
from search_spaces.plan import PruningPlan, Ranking
from search_spaces.ratios import Cell
from trainables.pruning_trial import PruningTrial, error_location
from trainables.tasks import TrialTask

RETRIES = 2
"""How often a trial whose worker was lost goes on from its last epoch on another."""


class SearchFailed(RuntimeError):
    """Too many trials in a row failed; the message has the last one's reason."""


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


class RecordedSearch(Searcher):
    """Optuna's proposals for Tune, each recorded in the trial log before it runs and again when it ended.

    A search is rebuilt from the log alone: finished trials are told to the study, unfinished ones are proposed again
    under their numbers before anything new is.
    """

    def __init__(self, plan: SearchPlan, log: TrialLog, task: TrialTask, on_end: Callable[[Finished], None]) -> None:
        super().__init__(metric="accuracy", mode="max")
        self._plan, self._log, self._task, self._on_end = plan, log, task, on_end
        self._resumed = unfinished(log)
        self._running: dict[str, Proposed] = {}
        # Trials of an earlier start that this study cannot express; they end in the log alone.
        self._unknown: set[str] = set()
        self._failures = 0
        self.stopped = ""
        self._optuna = OptunaSearch(
            plan.distributions,
            metric="accuracy",
            mode="max",
            sampler=plan.sampler,
            points_to_evaluate=[p for r in self._resumed if (p := self._params(r.plan)) is not None] or None,
            study_name="search",
            storage=_study_storage(plan, log),
        )

    @property
    def remaining(self) -> int:
        """Number of trials still to run."""
        return len(self._resumed) + max(0, self._plan.max_trials - len(searched(self._log)))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial's configuration, or that there is none."""
        if self._resumed:
            record = self._resumed.pop(0)
            if self._params(record.plan) is None:
                self._unknown.add(trial_id)
            else:
                self._optuna.suggest(trial_id)
        elif self._is_over():
            return str(Searcher.FINISHED)
        else:
            record = self._propose(self._optuna.suggest(trial_id))
        self._running[trial_id] = record
        return {"trial": record.trial, "plan": record.plan, "seed": record.seed}

    def _params(self, plan: str) -> dict[str, int] | None:
        return _params(self._plan, plan)

    def _is_over(self) -> bool:
        running = [PruningPlan.parse(each.plan).cell for each in self._running.values()]
        return bool(
            self.stopped
            or len(searched(self._log)) >= self._plan.max_trials
            or time.time() > self._plan.deadline
            or (self._plan.allowance is not None and self._plan.allowance.is_spent(ended(self._log), running))
        )

    def _propose(self, params: dict[str, int]) -> Proposed:
        number = self._log.next_trial
        record = Proposed(
            trial=number,
            plan=str(self._plan.ranking.plan(self._plan.cell_of(params))),
            start=self._plan.start,
            seed=self._plan.seed + number,
            seen=sum(f.accuracy is not None for f in surface_trials(self._log, self._plan.ranking)),
            sampler=self._plan.name,
            params={name: int(value) for name, value in params.items()},
        )
        self._log.propose(record)
        return record

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Accuracies of earlier epochs are not told to the sampler: they rank cells wrongly."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record how a trial ended, and tell the study."""
        proposed = self._running.pop(trial_id)
        record = self._finished(proposed, result or {}, error)
        self._log.finish(record)
        if trial_id not in self._unknown:
            told = None if record.accuracy is None else {"accuracy": record.accuracy}
            self._optuna.on_trial_complete(trial_id, told, error=told is None)
        self._failures = self._failures + 1 if record.accuracy is None else 0
        if self._failures >= self._plan.max_failures:
            self.stopped = f"{self._failures} trials in a row failed; the last one: {record.error}"
        self._on_end(record)

    def _finished(self, proposed: Proposed, result: dict[str, Any], error: bool) -> Finished:
        reason = result.get("error", "") or (_left_reason(self._task, proposed.trial) if error else "")
        return Finished.of(proposed, result, reason)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles the searcher for its own restore, which is not used: the trial log is the state."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Tune's snapshots hold nothing either."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


def _left_reason(task: TrialTask, number: int) -> str:
    store = RunStore(task.checkpoints)
    name = error_location(task, number).rsplit("/", 1)[-1]
    return store.read(name).decode() if store.exists(name) else "its worker was lost"


def _params(plan: SearchPlan, removed: str) -> dict[str, int] | None:
    """Return what the study calls a plan; None for one that is not the ranking's, or does not fit the parameters."""
    parsed = PruningPlan.parse(removed)
    return plan.params_of(parsed.cell) if parsed in plan.ranking else None


def _study_storage(plan: SearchPlan, log: TrialLog) -> optuna.storages.InMemoryStorage:
    """Return a storage whose study `search` holds every trial that tells of the surface and fits the parameters."""
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="search", direction="maximize", sampler=plan.sampler)
    for finished in surface_trials(log, plan.ranking):
        params = _params(plan, finished.plan)
        if params is None:
            continue
        state = TrialState.FAIL if finished.accuracy is None else TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                state=state, value=finished.accuracy, params=params, distributions=plan.distributions
            )
        )
    return storage


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make sure that Ctrl-C ends the search: Ray and Tune may swallow the exception, or turn it into another."""
    pressed = False
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception:
        if not pressed:
            raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def run_search(
    plan: SearchPlan,
    log: TrialLog,
    task: TrialTask,
    resources: dict[str, float],
    concurrent: int,
    on_end: Callable[[Finished], None],
    waiting: Waiting,
) -> None:
    """Run all trials that are left, `concurrent` at a time; every one is in the log when this returns.

    Args:
        plan: what to search, and how far.
        log: the run's trials so far; grows.
        task: what the trials share.
        resources: Ray resources of one trial.
        concurrent: number of trials at a time.
        on_end: called with every trial's record when it ended.
        waiting: says why no trial runs.

    Raises:
        SearchFailed: too many trials in a row failed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = RecordedSearch(plan, log, task, on_end)
    trainable = tune.with_resources(
        tune.with_parameters(PruningTrial, task=task), tune.PlacementGroupFactory([resources])
    )
    with tempfile.TemporaryDirectory(prefix="dpt_search_") as scratch:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=search,
                num_samples=max(1, search.remaining),
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[WaitingTrials(waiting)],
            ),
        )
        with _interruptible():
            tuner.fit()
    if search.stopped:
        raise SearchFailed(search.stopped)
    if unfinished(log):
        raise SearchFailed("the search ended early; the same command goes on from here")
