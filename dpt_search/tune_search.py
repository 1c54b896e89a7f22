"""The search on Ray Tune: proposals from an Optuna sampler, every one of them recorded before it runs."""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import optuna
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from dpt_search.lost import LossCallback, Losses
from dpt_search.observed import ended, searched, surface_trials, unfinished
from dpt_search.search_plan import SearchPlan, params_of_plan, study_storage
from dpt_search.store import Finished, Proposed, RunStore, TrialLog
from dpt_search.waiting import Waiting
from dpt_search.waiting_trials import WaitingTrials
from search_spaces.plan import PruningPlan
from trainables.pruning_trial import PruningTrial, error_location
from trainables.tasks import TrialTask


class SearchFailed(RuntimeError):
    """Too many trials in a row failed; the message has the last one's reason."""


class RecordedSearch(Searcher):
    """Optuna's proposals for Tune, each recorded in the trial log before it runs and again when it ended.

    A search is rebuilt from the log alone: finished trials are told to the study, unfinished ones are proposed again
    under their numbers before anything new is. So is a trial whose worker was lost.
    """

    def __init__(
        self,
        plan: SearchPlan,
        log: TrialLog,
        task: TrialTask,
        on_end: Callable[[Finished], None],
        room: Callable[[int], int] = lambda left: left,
        on_lost: Callable[[Proposed, bool], None] = lambda record, with_node: None,
    ) -> None:
        """
        Args:
            plan: what to search, and how far.
            log: the run's trials so far; grows.
            task: what the trials share.
            on_end: called with every trial's record when it ended.
            room: number of trials that may run now, given how many are to run or to end.
            on_lost: called with a trial that lost its worker and goes on elsewhere, and whether its node went too.
        """
        super().__init__(metric="accuracy", mode="max")
        # Optuna would announce the study.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._plan, self._log, self._task, self._on_end = plan, log, task, on_end
        self._room, self._on_lost, self._losses = room, on_lost, Losses()
        self._resumed = unfinished(log)
        self._running: dict[str, Proposed] = {}
        # By trial number: what the study calls it. Trials that it cannot express have no name there.
        self._names: dict[int, str] = {}
        self._failures = 0
        self.stopped = ""
        self._optuna = OptunaSearch(
            plan.distributions,
            metric="accuracy",
            mode="max",
            sampler=plan.sampler,
            points_to_evaluate=[p for r in self._resumed if (p := self._params(r.plan)) is not None] or None,
            study_name="search",
            storage=study_storage(plan, log),
        )

    @property
    def remaining(self) -> int:
        """Number of trials still to run."""
        return len(self._resumed) + max(0, self._plan.max_trials - len(searched(self._log)))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial's configuration, None where there is no room for it now, or that there is none."""
        if not self._resumed and self._is_over():
            # A trial that runs may yet lose its worker, and has to be begun again then; more room is of no use.
            self._room(len(self._running))
            return None if self._running else str(Searcher.FINISHED)
        if len(self._running) >= self._room(self.remaining + len(self._running)):
            return None
        record = self._again(trial_id) if self._resumed else self._propose(trial_id)
        self._running[trial_id] = record
        return {"trial": record.trial, "plan": record.plan, "seed": record.seed}

    def _again(self, trial_id: str) -> Proposed:
        """Take the oldest trial that was proposed and has not ended."""
        record = self._resumed.pop(0)
        if record.trial not in self._names and self._params(record.plan) is not None:
            # The study has its point at the head of its queue.
            self._optuna.suggest(trial_id)
            self._names[record.trial] = trial_id
        return record

    def _params(self, plan: str) -> dict[str, int] | None:
        return params_of_plan(self._plan, plan)

    def _is_over(self) -> bool:
        running = [PruningPlan.parse(each.plan).cell for each in self._running.values()]
        return bool(
            self.stopped
            or len(searched(self._log)) >= self._plan.max_trials
            or time.time() > self._plan.deadline
            or (self._plan.allowance is not None and self._plan.allowance.is_spent(ended(self._log), running))
        )

    def _propose(self, trial_id: str) -> Proposed:
        params, number = self._optuna.suggest(trial_id), self._log.next_trial
        self._names[number] = trial_id
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
        """Note that the trial went on; the sampler is not told of earlier epochs, which rank cells wrongly."""
        self._losses.progress(self._running[trial_id].trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record how a trial ended, and tell the study; of an error, `lost` is called next."""
        if not error:
            self._end(trial_id, result or {}, (result or {}).get("error", ""))

    def lost(self, trial_id: str, with_node: bool) -> None:
        """Begin a trial again that lost its worker, alone or with the node, unless that keeps happening to it.

        A trial that failed by itself, and left the reason because its process had to go, has failed at once.
        """
        record = self._running[trial_id]
        reason = _left_reason(self._task, record.trial)
        if reason or self._losses.is_final(record.trial, with_node):
            self._end(trial_id, {}, reason or "its worker was lost")
            return
        self._resumed.insert(0, self._running.pop(trial_id))
        self._on_lost(record, with_node)

    def _end(self, trial_id: str, result: dict[str, Any], reason: str) -> None:
        proposed = self._running.pop(trial_id)
        record = Finished.of(proposed, result, reason)
        self._log.finish(record)
        if (name := self._names.get(proposed.trial)) is not None:
            told = None if record.accuracy is None else {"accuracy": record.accuracy}
            self._optuna.on_trial_complete(name, told, error=told is None)
        self._failures = self._failures + 1 if record.accuracy is None else 0
        if self._failures >= self._plan.max_failures:
            self.stopped = f"{self._failures} trials in a row failed; the last one: {record.error}"
        self._on_end(record)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles the searcher for its own restore, which is not used: the trial log is the state."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Tune's snapshots hold nothing either."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


def _left_reason(task: TrialTask, number: int) -> str:
    """Take the reason that a trial left behind; empty where it left none."""
    store = RunStore(task.checkpoints)
    name = error_location(task, number).rsplit("/", 1)[-1]
    if not store.exists(name):
        return ""
    reason = store.read(name).decode()
    store.delete(name)
    return reason


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
    search: RecordedSearch,
    log: TrialLog,
    task: TrialTask,
    resources: dict[str, float],
    concurrent: int,
    waiting: Waiting,
) -> None:
    """Run all trials that are left, `concurrent` at a time at most; every one is in the log when this returns.

    Args:
        search: proposes trials, and records them.
        log: the run's trials so far; grows.
        task: what the trials share.
        resources: Ray resources of one trial.
        concurrent: number of trials at a time.
        waiting: says why no trial runs.

    Raises:
        SearchFailed: too many trials in a row failed.
    """
    # Every trial's end has its line and its record, and every wait its line; Tune would add traces of what goes on.
    for name in ("tune", "execution.tune_controller", "execution.insufficient_resources_manager"):
        logging.getLogger(f"ray.tune.{name}").setLevel(logging.CRITICAL)
    trainable = tune.with_resources(
        tune.with_parameters(PruningTrial, task=task), tune.PlacementGroupFactory([resources])
    )
    with tempfile.TemporaryDirectory(prefix="dpt_search_") as scratch:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=search,
                # The search itself says when it is over: a trial whose worker was lost is proposed again.
                num_samples=-1,
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                # Tune's checkpoints would have to be written here, to where workers of other nodes see nothing.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[LossCallback(search.lost), WaitingTrials(waiting)],
            ),
        )
        with _interruptible():
            tuner.fit()
    if search.stopped:
        raise SearchFailed(search.stopped)
    if unfinished(log):
        raise SearchFailed("the search ended early; the same command goes on from here")
