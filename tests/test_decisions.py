"""What a run decides among: plans near a limit are built and timed, units that are kept are never ranked."""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import TINY_RANKING

from dpt_search import run as runs
from dpt_search.config import BadConfig
from dpt_search.costs_table import write_costs
from dpt_search.decisions import NAME, goals_of, settled
from dpt_search.map_sampler import MapSampler
from dpt_search.run import Run, configured_run, read_dense_accuracy
from dpt_search.search_stages import _sampler, decide, recommend_stage
from dpt_search.store import Finished, Proposed, TrialLog
from dpt_search.verdict import verdict
from search_spaces.plan import PruningPlan
from search_spaces.ratios import Cell
from trainables.importance import rank
from trainables.tasks import RankTask, TimingTask
from trainables.timing import time_plans

UNITS = 8


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have workers' functions called in this process; return the names of those that were."""
    called = []

    def call(_: object, target: str, *args: Any, **rest: object) -> Any:
        called.append(target)
        module, name = target.split(":")
        return getattr(importlib.import_module(module), name)(*args)

    monkeypatch.setattr(runs, "call", call)
    monkeypatch.setattr(Run, "start_ray", lambda self: None)
    return called


def asking(run: Run, budget: str, spread: float, saved: float = 0.08) -> Run:
    """The run with another budget, its profile saying that every unit saves so much of a second of seconds."""
    config = replace(run.config, budget=budget, timing_batches=[1], timing_seconds=0.1)
    dense = {"kind": "dense", "index": -1, "macs": 1e6, "params": 1000, "seconds_1": 1.0, "spread_1": 0.01}
    units = [(kind, index) for kind in ("attn", "act") for index in range(4)]
    one = {"macs": 1e5, "params": 100, "seconds_1": saved, "spread_1": spread}
    write_costs(run.store, "a CPU", [dense, *({"kind": kind, "index": index, **one} for kind, index in units)])
    return replace(run, config=config)


def test_a_front_far_from_the_limit_is_taken_as_predicted(tiny_run: Run, here: list[str]) -> None:
    # Speedups of 1.087, 1.190, 1.316, ...: two units are enough, and clearly.
    run = asking(tiny_run, "speedup@1=1.15", spread=1e-4)
    (goal,) = settled(run)
    assert (goal,) == goals_of(run)
    assert {cell.total for cell in goal.cells} == {2}
    assert here == [] and not run.store.exists(NAME)


def test_plans_near_the_limit_are_built_and_timed_once(tiny_run: Run, here: list[str]) -> None:
    run = asking(tiny_run, "speedup@1=1.18 units=2", spread=0.02)
    before = goals_of(run)[0]
    after = settled(run)[0]
    timed = json.loads(run.store.read(NAME))
    for cell in before.cells:
        found = timed[str(TINY_RANKING.plan(cell))]["1"]
        assert found["low"] <= found["speedup"] <= found["high"]
        assert (cell in after.cells) == (found["low"] >= 1.18)
    count = len(here)
    assert count and set(here) == {"trainables.timing:time_plans"}
    assert settled(run)[0] == after
    assert len(here) == count


def test_a_speed_that_measuring_shows_to_be_out_of_reach_is_refused(tiny_run: Run, here: list[str]) -> None:
    # All eight units seem to save 0.96 of a second, which no model of this kind can measure.
    run = asking(tiny_run, "speedup@1=24", spread=0.004, saved=0.12)
    with pytest.raises(BadConfig, match=r"no plan meets budget speedup@1=24: .* ask for at most speedup@1="):
        settled(run)
    assert here == ["trainables.timing:time_plans"]


def test_a_recommendation_is_never_too_close_to_say(tiny_run: Run, here: list[str]) -> None:
    run = searched(asking(tiny_run, "speedup@1=1.18", spread=0.02))
    (row,) = decide(run, run.config.budgets)["budgets"]
    assert not row["is_sure"]
    recommend_stage(run)
    (row,) = json.loads(run.store.read("recommendation.json"))["budgets"]
    assert row["is_sure"]
    assert row["measured"] >= 1.18


def searched(run: Run) -> Run:
    """The run with a trial of each cell of two units and one of four; the latter, the smallest, is the worst."""
    log = TrialLog(run.store)
    for number, cell in enumerate([Cell(0, 2), Cell(1, 1), Cell(2, 0), Cell(2, 2)]):
        plan = str(TINY_RANKING.plan(cell))
        log.propose(Proposed(number, plan, "dense", number, number, "map", {}))
        log.finish(Finished(number, plan, "dense", "finished", accuracies=[0.8 - cell.total / 100], cost=1.0))
    return run


def timed_as(monkeypatch: pytest.MonkeyPatch, speedup: Callable[[PruningPlan], float]) -> list[str]:
    """Have workers say so of every plan; return the plans that they are asked about."""
    asked: list[str] = []

    def call(_: object, target: str, task: TimingTask, **rest: object) -> Any:
        assert target == "trainables.timing:time_plans"
        asked.extend(task.plans)
        fast = {plan: speedup(PruningPlan.parse(plan)) for plan in task.plans}
        return {plan: {"1": {"speedup": found, "low": found - 0.01}} for plan, found in fast.items()}

    monkeypatch.setattr(runs, "call", call)
    monkeypatch.setattr(Run, "start_ray", lambda self: None)
    return asked


def test_the_plan_to_be_fine_tuned_is_timed_wherever_it_is_predicted(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Predicted to be 1.190 with two units, clearly enough, and 1.1 when built: a third has to go.
    run = searched(asking(tiny_run, "units=3 speedup@1=1.15", spread=1e-4))
    asked = timed_as(monkeypatch, lambda plan: 1 + 0.07 * len(plan.units))
    (before,) = decide(run, run.config.budgets)["budgets"][1:]
    recommend_stage(run)
    _, after = json.loads(run.store.read("recommendation.json"))["budgets"]
    assert asked[0] == before["plan"] and len(PruningPlan.parse(before["plan"]).units) == 2
    assert after["plan"] == asked[-1] and len(PruningPlan.parse(after["plan"]).units) == 3
    assert after["measured"] == pytest.approx(1.21)


@pytest.mark.parametrize("chosen", ["units=2", "macs=0.9"])
def test_no_plan_is_timed_that_is_not_to_be_fine_tuned_for_a_speedup(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    run = searched(asking(tiny_run, f"speedup@1=1.15 {chosen}", spread=1e-4))
    asked = timed_as(monkeypatch, lambda plan: 2.0)
    recommend_stage(run)
    assert asked == []


@pytest.mark.parametrize(("start", "told"), [("dense", True), ("probe", False)])
def test_the_dense_accuracy_counts_where_trials_start_from_it(tiny_run: Run, start: str, told: bool) -> None:
    run = searched(replace(tiny_run, config=replace(tiny_run.config, budget="units=2", start=start)))
    log = TrialLog(run.store)
    for number, cell in enumerate([Cell(0, 2), Cell(1, 1), Cell(2, 0)], start=4):
        plan = str(TINY_RANKING.plan(cell))
        log.propose(Proposed(number, plan, "probe", number, number, "map", {}))
        log.finish(Finished(number, plan, "probe", "finished", accuracies=[0.78], cost=1.0))
    before = decide(run, run.config.budgets)["surface"]["mean"][0][0]
    run.store.write_json("dense/dense.json", {"accuracy": 0.95})
    after = decide(run, run.config.budgets)["surface"]["mean"][0][0]
    sampler = _sampler(run, TINY_RANKING, goals_of(run), tuple)
    assert isinstance(sampler, MapSampler)
    assert (sampler._dense, read_dense_accuracy(run)) == ((0.95, 0.95) if told else (None, None))
    assert (after > 0.9 > before) if told else (after == before)


def test_timed_plans_are_merged_models_beside_the_dense_one(tiny_run: Run) -> None:
    plans = ("attn:0,1,2,3 act:0,1,2,3", "")
    found = time_plans(TimingTask(**tiny_run.task(), plans=plans, batches=(1, 4), seconds=0.2))
    for timing in found.values():
        assert timing.keys() == {"1", "4"}
    everything, nothing = (found[plan]["4"] for plan in plans)
    assert everything["low"] > 1.2
    assert everything["dense_seconds"] > everything["merged_seconds"] > 0
    assert nothing["low"] < 1.1 and nothing["high"] > 0.9


@pytest.mark.parametrize("method", ["taylor", "conditional"])
def test_units_that_are_kept_are_in_no_ranking(tiny_run: Run, method: str) -> None:
    task = {**tiny_run.task(), "batches": 1, "method": method}
    free = rank(RankTask(**task, keep=""))
    found = rank(RankTask(**task, keep="attn:0,2 act:3"))
    assert sorted(free["attn"]) == sorted(free["act"]) == [0, 1, 2, 3]
    assert sorted(found["attn"]) == [1, 3]
    assert sorted(found["act"]) == [0, 1, 2]
    if method == "taylor":
        assert found["attn"] == [i for i in free["attn"] if i in (1, 3)]


@pytest.mark.parametrize(
    ("keep", "says"),
    [("attn:9", "keep names attn:9"), ("attn:0,1,2,3 act:0,1,2,3", "leaves nothing to remove")],
)
def test_what_cannot_be_kept_is_refused(tiny_run: Run, here: list[str], keep: str, says: str) -> None:
    from dpt_search.stages import dense

    config = replace(tiny_run.config, keep=keep, run_dir=tiny_run.config.run_dir + "-kept")
    with pytest.raises(BadConfig, match=says):
        dense(configured_run(config, lambda _: None))


@pytest.mark.parametrize(
    ("budget", "met", "says"),
    [
        ("units=2", True, "met, 2 units removed"),
        ("units=3", False, "NOT met, 2 units removed"),
        ("speedup=1.3", True, "met, 1.310x measured at batch 64 (95 % interval 1.29x to 1.33x)"),
        ("speedup=1.32", False, "NOT met, 1.310x"),
        ("speedup@8=1.3", None, "not measured at batch 8"),
        ("macs=0.75", True, "met, 750 macs left, 0.750 of"),
        ("macs=700", False, "NOT met, 750 macs left"),
        ("params=0.5", False, "NOT met, 60 params left, 0.600 of"),
    ],
)
def test_the_verdict_is_by_what_was_measured(budget: str, met: bool | None, says: str) -> None:
    summary = {
        "plan": "attn:0 act:1", "dense": {"macs": 1000.0, "params": 100}, "merged": {"macs": 750.0, "params": 60},
        "timing": {"64": {"speedup": 1.31, "low": 1.29, "high": 1.33}},
    }  # fmt: skip
    found = verdict(budget, summary)
    assert found["met"] is met
    assert says in found["text"]
