"""Trials whose worker was lost are begun again under their numbers; what counts as a failure, and what does not."""

from typing import Any

import pytest
from conftest import TINY_RANKING
from optuna.distributions import IntDistribution
from optuna.samplers import RandomSampler
from ray.exceptions import RayActorError
from ray.tune.search import Searcher

from dpt_search import demand
from dpt_search.demand import Demand
from dpt_search.lost import MOST_LOSSES, Losses, is_loss_of_node
from dpt_search.run import Run
from dpt_search.search_plan import SearchPlan
from dpt_search.store import Finished, Proposed, TrialLog
from dpt_search.tune_search import RecordedSearch
from search_spaces.ratios import Cell
from trainables.locations import exists, write_bytes
from trainables.pruning_trial import error_location
from trainables.tasks import TrialTask

RESULT = {"accuracy": 0.5, "accuracies": [0.4, 0.5], "error": ""}


class Trials:
    """A search of two trials that is told what Tune tells it."""

    def __init__(self, run: Run, room: int = 99) -> None:
        space = {name: IntDistribution(0, 4) for name in ("n_attn", "n_act")}
        plan = SearchPlan(
            "random", RandomSampler(0), space, lambda params: Cell(params["n_attn"], params["n_act"]),
            lambda cell: {"n_attn": cell.n_attn, "n_act": cell.n_act}, TINY_RANKING, 0, 2, max_failures=1,
        )  # fmt: skip
        self.log, self.ended, self.lost = TrialLog(run.store), list[Finished](), list[tuple[Proposed, bool]]()
        self.task = TrialTask(**run.task(), recipe=run.config.trial, checkpoints=run.store.path("checkpoints"))
        self.search = RecordedSearch(
            plan, self.log, self.task, self.ended.append, lambda left: min(left, room),
            lambda record, with_node: self.lost.append((record, with_node)),
        )  # fmt: skip
        self._count = 0

    def begin(self) -> tuple[str, Any]:
        """Ask for a trial; return Tune's name of it, and its configuration."""
        self._count += 1
        return f"tune-{self._count}", self.search.suggest(f"tune-{self._count}")

    def lose(self, name: str, with_node: bool) -> None:
        self.search.on_trial_complete(name, error=True)
        self.search.lost(name, with_node)


@pytest.fixture
def trials(tiny_run: Run) -> Trials:
    return Trials(tiny_run)


def test_a_trial_whose_node_is_lost_goes_on_under_its_number_however_often(trials: Trials) -> None:
    (first, told), (second, _) = trials.begin(), trials.begin()
    for _ in range(MOST_LOSSES + 3):
        trials.lose(first, with_node=True)
        first, again = trials.begin()
        assert again == told
    for name in (first, second):
        trials.search.on_trial_complete(name, RESULT)
    assert trials.begin()[1] == Searcher.FINISHED
    assert trials.search.stopped == ""
    assert sorted(trials.log.proposed) == sorted(trials.log.finished) == [0, 1]
    assert [each.status for each in trials.ended] == ["finished", "finished"]
    assert [(record.trial, with_node) for record, with_node in trials.lost] == [(0, True)] * (MOST_LOSSES + 3)
    study = trials.search._optuna._ot_study
    assert [trial.value for trial in study.trials] == [0.5, 0.5]


def test_a_trial_that_keeps_losing_its_worker_alone_has_failed(trials: Trials) -> None:
    for attempt in range(MOST_LOSSES + 1):
        name, told = trials.begin()
        assert told["trial"] == 0
        trials.lose(name, with_node=False)
        assert len(trials.ended) == (attempt == MOST_LOSSES)
    assert trials.ended[0].error == "its worker was lost"
    assert trials.search.stopped.startswith("1 trials in a row failed")


def test_a_trial_that_left_a_reason_has_failed_by_itself_and_at_once(trials: Trials, tiny_run: Run) -> None:
    name, told = trials.begin()
    place = error_location(trials.task, told["trial"])
    write_bytes(place, b"RuntimeError: the device is out of memory")
    trials.lose(name, with_node=False)
    assert [each.error for each in trials.ended] == ["RuntimeError: the device is out of memory"]
    assert not exists(place)


def test_a_trial_that_comes_an_epoch_further_may_lose_as_many_workers_again(trials: Trials) -> None:
    for _ in range(3 * MOST_LOSSES):
        name, _ = trials.begin()
        trials.search.on_trial_result(name, RESULT)
        trials.lose(name, with_node=False)
    assert trials.ended == []


def test_the_search_waits_for_trials_that_may_yet_be_lost_and_for_room(tiny_run: Run) -> None:
    trials = Trials(tiny_run, room=1)
    first, _ = trials.begin()
    assert trials.begin()[1] is None
    trials.search.on_trial_complete(first, RESULT)
    second, told = trials.begin()
    assert told["trial"] == 1
    # All are proposed, but this one may come back.
    assert trials.begin()[1] is None
    trials.search.on_trial_complete(second, RESULT)
    assert trials.begin()[1] == Searcher.FINISHED


def test_losses_are_counted_by_trial() -> None:
    losses = Losses()
    assert not any(losses.is_final(trial, False) for trial in (0, 1) for _ in range(MOST_LOSSES))
    assert losses.is_final(0, False)
    losses.progress(1)
    assert not losses.is_final(1, False)


def test_an_error_of_the_trials_own_is_no_loss_of_a_node() -> None:
    assert not is_loss_of_node(None)
    assert not is_loss_of_node(RuntimeError("the device is unusable"))
    assert is_loss_of_node(RayActorError(preempted=True))


def test_on_one_machine_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with Demand({"CPU": 1}, most=3) as demand:
        assert demand.room(left=1) == 3


def test_a_probe_takes_room_on_one_machine_too_and_trials_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(demand, "capacity", lambda wanted: 2)
    monkeypatch.setattr(demand, "LOOKED", 0.0)
    left = [0, 0, 1, 2]
    with Demand({"CPU": 1}, most=3, leaves=lambda workers: left.pop(0)) as asked:
        asked.wait(left=9)
        assert left == [2]
        # It has ended: as many as the user wants, though some have to wait.
        assert asked.room(left=9) == 3
