"""Swaps on the plan that is fine-tuned: which, how they are judged, and that they tell nothing of the surface."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpt_search import refine as module
from dpt_search.config import RunConfig
from dpt_search.costs_table import write_costs
from dpt_search.evidence import read_run, warnings
from dpt_search.observed import REFINE, ended, searched, surface_trials, unfinished
from dpt_search.options import EMBEDDED
from dpt_search.refine import needed_gain, refine, swapped_plans
from dpt_search.report import write_report
from dpt_search.run import Run, configured_run, open_run
from dpt_search.search_stages import chosen_row, decide, recommend_stage
from dpt_search.store import BadRun, Finished, Proposed, RunStore, TrialLog
from dpt_search.tune_search import RecordedSearch, SearchPlan
from search_spaces.plan import KINDS, PruningPlan, Ranking
from search_spaces.ratios import Cell
from trainables.locations import resolve
from trainables.settings import DataSettings, ModelSettings
from trainables.tasks import TrialTask

ROOT = Path(__file__).parents[1]
RANKING = Ranking((3, 1, 0, 2), (0, 2, 3, 1))
CELLS = ((0, 0), (2, 2), (4, 0), (0, 4), (2, 2), (1, 3), (3, 1), (1, 1))
PLAN = "attn:1,3 act:0,2"
FIRST, SECOND = "attn:0,3 act:0,2", "attn:1,3 act:0,3"
BETTER = {FIRST: 0.05}


class Workers:
    """What stands for Ray: trials whose accuracy is 0.8 and what is added for the plan."""

    def __init__(self) -> None:
        self.added: dict[str, float] = {}
        self.failing: tuple[str, ...] = ()
        self.lucky: dict[str, float] = {}
        self.done: list[tuple[int, str, int]] = []
        self.stop_after = 10**6

    def __call__(self, wanted: object, target: str, jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        assert target == "trainables.table_trial:run_trial"
        for position, (_, number, plan, seed) in enumerate(jobs):
            if len(self.done) == self.stop_after:
                raise KeyboardInterrupt
            first = plan not in [before for _, before, _ in self.done]
            self.done.append((number, plan, seed))
            if plan in self.failing:
                yield position, {"error": "Diverged: the loss became nan"}
                continue
            accuracy = 0.8 + self.added.get(plan, 0.0) + (self.lucky.get(plan, 0.0) if first else 0.0)
            yield position, {"accuracies": [0.5, accuracy], "cost": 1.0, "seconds": 2.0, "error": ""}

    @property
    def plans(self) -> list[str]:
        return [plan for _, plan, _ in self.done]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    made = Workers()
    monkeypatch.setattr(module, "call_each", made)
    monkeypatch.setattr("dpt_search.run.Run.start_ray", lambda _: None)
    monkeypatch.setattr("dpt_search.run.Run.resources", {"CPU": 1})
    return made


def write_trial(log: TrialLog, plan: str, accuracy: float, sampler: str = "map") -> None:
    number = log.next_trial
    log.propose(Proposed(number, plan, "dense", seed=number, seen=number, sampler=sampler, params={}))
    log.finish(Finished(number, plan, "dense", "finished", 0.5, [0.6, accuracy], cost=1.0, seconds=9.0))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of a model with four blocks, recommended: (2,2) for four units, of which two trials say 0.8."""
    config = RunConfig(
        ModelSettings("vit_tiny_patch16_224"), DataSettings("cifar10"), run_dir=str(tmp_path / "run"),
        budget="units=2,4", max_trials=len(CELLS), refine=3,
    )  # fmt: skip
    made = open_run(config, lambda _: None)
    store = made.store
    order = {"attn": list(RANKING.attn), "act": list(RANKING.act)}
    store.write_json("ranking.json", {"method": "taylor", **order, "importance": {kind: [1.0] * 4 for kind in KINDS}})
    cost = {"macs": 10.0, "params": 10.0, "seconds_1": 10.0, "spread_1": 0.0}
    units = [{"kind": kind, "index": i, **cost, "seconds_1": 1.0 + i / 10} for kind in KINDS for i in range(4)]
    write_costs(store, "a CPU", [{"kind": "dense", "index": -1, **cost, "seconds_1": 100.0}, *units])
    log = TrialLog(store)
    for a, g in CELLS:
        write_trial(log, str(RANKING.plan(Cell(a, g))), 0.8 - 0.02 * ((a - 2) ** 2 + (g - 2) ** 2))
    recommend_stage(made)
    assert chosen_row(made)["plan"] == PLAN
    return made


def again(run: Run, **changes: Any) -> Run:
    """Start on the same directory, perhaps with other values: recommend and refine."""
    started = configured_run(replace(run.config, **changes), run.say)
    recommend_stage(started)
    refine(started)
    return started


cells = st.builds(Cell, st.integers(0, 4), st.integers(0, 4))


@given(cells)
def test_every_swap_keeps_the_cell_changes_one_unit_and_comes_once(cell: Cell) -> None:
    plan, swaps = RANKING.plan(cell), swapped_plans(RANKING, cell)
    assert len(set(swaps)) == len(swaps) == cell.n_attn * (4 - cell.n_attn) + cell.n_act * (4 - cell.n_act)
    for swap in swaps:
        assert swap.cell == cell
        back, out = set(plan.units) - set(swap.units), set(swap.units) - set(plan.units)
        assert len(back) == len(out) == 1
        assert back.pop().kind == out.pop().kind


@given(cells)
def test_swaps_come_by_their_distance_from_the_border_of_the_ranking(cell: Cell) -> None:
    def distance(swap: PruningPlan) -> int:
        (back,), (out,) = set(plan.units) - set(swap.units), set(swap.units) - set(plan.units)
        order = getattr(RANKING, out.kind)
        return order.index(out.index) - order.index(back.index)

    plan, swaps = RANKING.plan(cell), swapped_plans(RANKING, cell)
    assert [distance(swap) for swap in swaps] == sorted(distance(swap) for swap in swaps)


def test_the_most_important_removed_goes_back_for_the_least_important_kept() -> None:
    assert [str(plan) for plan in swapped_plans(RANKING, Cell(2, 2))[:4]] == [
        FIRST, SECOND, "attn:2,3 act:0,2", "attn:1,3 act:0,1",
    ]  # fmt: skip


def test_a_swap_that_is_better_replaces_the_plan_and_says_what_it_replaced(run: Run, workers: Workers) -> None:
    workers.added = BETTER
    refine(run)
    row = chosen_row(run)
    assert (row["plan"], row["refined"], row["replaced"]) == (FIRST, True, PLAN)
    assert row["cell"] == [2, 2]
    assert row["speedup"] == {"1": pytest.approx(100 / (100 - sum((1.3, 1.0, 1.0, 1.2))))}
    other = run.store.read_json("recommendation.json")["budgets"][0]
    assert (other["budget"], "refined" in other) == ("units=2", False)
    found = run.store.read_json("refine.json")
    assert (found["plan"], found["chosen"], found["candidate"]) == (PLAN, FIRST, FIRST)
    assert found["gain"] == pytest.approx(0.05) and found["gain"] > found["needed"] > 0


def test_every_swap_is_tried_once_and_the_best_one_twice(run: Run, workers: Workers) -> None:
    workers.added = BETTER
    refine(run)
    # The ranking's plan has its two trials from the search.
    assert workers.plans == [FIRST, SECOND, "attn:2,3 act:0,2", FIRST]
    log = TrialLog(run.store)
    numbers = range(len(CELLS), len(CELLS) + 4)
    assert [number for number, _, _ in workers.done] == list(numbers)
    assert [seed for _, _, seed in workers.done] == list(numbers)
    for number in numbers:
        assert log.proposed[number].sampler == REFINE
        assert log.proposed[number].plan == log.finished[number].plan == workers.plans[number - len(CELLS)]
        assert log.proposed[number].seen == len(CELLS)


def test_a_plan_that_was_only_predicted_is_tried_too(run: Run, workers: Workers) -> None:
    for path in Path(run.config.run_dir, "trials").glob("00000[14]-*"):
        path.unlink()
    recommend_stage(run)
    assert chosen_row(run)["status"] == "predicted"
    workers.added = BETTER
    refine(run)
    assert sorted(workers.plans) == sorted([FIRST, SECOND, "attn:2,3 act:0,2", PLAN, FIRST, PLAN])
    assert chosen_row(run)["plan"] == FIRST


def test_a_gain_within_the_noise_replaces_nothing(run: Run, workers: Workers) -> None:
    noise = decide(run, run.config.budgets)["surface"]["noise"]
    workers.added = {SECOND: 0.99 * needed_gain(noise, 3, 2, 2)}
    before = run.store.read("recommendation.json")
    refine(run)
    found = run.store.read_json("refine.json")
    assert (found["candidate"], found["chosen"]) == (SECOND, PLAN)
    assert 0 < found["gain"] <= found["needed"]
    assert run.store.read("recommendation.json") == before
    # A little more would do.
    workers.added = {SECOND: 1.01 * needed_gain(noise, 3, 2, 2)}
    for path in Path(run.config.run_dir).glob("trials/*"):
        if int(path.name[:6]) >= len(CELLS):
            path.unlink()
    Path(run.config.run_dir, "refine.json").unlink()
    refine(run)
    assert chosen_row(run)["plan"] == SECOND


def test_one_lucky_trial_is_not_enough(run: Run, workers: Workers) -> None:
    noise = decide(run, run.config.budgets)["surface"]["noise"]
    workers.lucky = {FIRST: 1.5 * needed_gain(noise, 3, 2, 2)}
    refine(run)
    assert workers.plans.count(FIRST) == 2
    assert chosen_row(run)["plan"] == PLAN


def test_swaps_that_are_worse_are_not_tried_again(run: Run, workers: Workers) -> None:
    workers.added = dict.fromkeys([FIRST, SECOND, "attn:2,3 act:0,2"], -0.01)
    refine(run)
    assert len(workers.done) == 3
    assert run.store.read_json("refine.json")["candidate"] == ""


def test_a_swap_that_fails_is_out_and_is_not_repeated(run: Run, workers: Workers) -> None:
    workers.added, workers.failing = BETTER, (FIRST,)
    refine(run)
    assert run.store.read_json("refine.json")["swaps"][FIRST] == []
    assert chosen_row(run)["plan"] == PLAN
    again(run, refine=4)
    assert workers.plans.count(FIRST) == 1
    assert len(workers.done) == 4


@pytest.mark.parametrize("swaps", [1, 5, 20])
def test_the_rule_is_rarely_fooled_by_noise(swaps: int) -> None:
    """No swap is better; how often does the best of them replace the plan?"""
    rng, repeats = np.random.default_rng(0), 20_000
    plan, first = rng.normal(size=(repeats, 2)).mean(axis=1), rng.normal(size=(repeats, swaps)).max(axis=1)
    theirs = (first + rng.normal(size=repeats)) / 2
    fooled = float(np.mean((first > plan) & (theirs - plan > needed_gain(1.0, swaps, 2, 2))))
    assert 0.001 < fooled < 0.05 + 0.005


def test_a_second_start_repeats_nothing_and_keeps_the_refined_plan(run: Run, workers: Workers) -> None:
    workers.added = BETTER
    refine(run)
    before, done = run.store.read("recommendation.json"), len(workers.done)
    again(run)
    assert len(workers.done) == done
    assert run.store.read("recommendation.json") == before


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_refinement_that_was_killed_goes_on(run: Run, workers: Workers, after: int) -> None:
    workers.added, workers.stop_after = BETTER, after
    with pytest.raises(KeyboardInterrupt):
        refine(run)
    assert searched(TrialLog(run.store)) == searched(TrialLog(run.store))[: len(CELLS)]
    assert unfinished(TrialLog(run.store)) == []
    workers.stop_after = 10**6
    again(run)
    numbers = [number for number, _, _ in workers.done]
    assert sorted(numbers) == list(range(len(CELLS), len(CELLS) + 4))
    assert chosen_row(run)["plan"] == FIRST


def test_more_swaps_go_on_from_those_there_are_and_fewer_use_no_others(run: Run, workers: Workers) -> None:
    workers.added = BETTER
    again(run, refine=1)
    again(run, refine=3)
    assert workers.plans == [FIRST, FIRST, SECOND, "attn:2,3 act:0,2"]
    again(run, refine=8)
    assert len(workers.done) == len(set(workers.plans)) + 1 == 9
    again(run, refine=10**6)
    assert len(workers.done) == 9
    assert chosen_row(run)["plan"] == FIRST


def test_a_swap_that_is_no_longer_enough_is_put_back(run: Run, workers: Workers) -> None:
    noise = decide(run, run.config.budgets)["surface"]["noise"]
    workers.added = {FIRST: 1.01 * needed_gain(noise, 1, 2, 2)}
    before = run.store.read_json("recommendation.json")
    again(run, refine=1)
    assert chosen_row(run)["plan"] == FIRST
    again(run, refine=8)
    assert run.store.read_json("recommendation.json") == before


def test_a_recommendation_made_anew_is_refined_anew_from_the_same_trials(run: Run, workers: Workers) -> None:
    workers.added = BETTER
    refine(run)
    done = len(workers.done)
    started = again(run, budget="units=3,4")
    assert len(workers.done) == done
    assert chosen_row(started)["plan"] == FIRST


def test_without_swaps_to_try_nothing_happens(run: Run, workers: Workers) -> None:
    said: list[str] = []
    before = run.store.read("recommendation.json")
    refine(configured_run(replace(run.config, refine=0), said.append))
    assert workers.done == said == []
    assert run.store.read("recommendation.json") == before
    assert not run.store.exists("refine.json")


def test_a_plan_without_a_swap_stays(run: Run, workers: Workers) -> None:
    again(run, budget="units=8")
    assert workers.done == []
    assert run.store.read_json("refine.json")["swaps"] == {}


def test_without_a_recommendation_it_says_what_to_run(run: Run, workers: Workers) -> None:
    run.store.delete("recommendation.json")
    with pytest.raises(BadRun, match="no recommendation for units=4"):
        refine(run)
    assert workers.done == []


class TestTheSurface:
    """Trials of plans that are not the ranking's, or of a refinement, are no observations of their cells."""

    @pytest.mark.parametrize(("plan", "sampler"), [(FIRST, REFINE), (PLAN, REFINE), (FIRST, "map")])
    def test_does_not_see_them(self, run: Run, plan: str, sampler: str) -> None:
        before = decide(run, run.config.budgets)
        log, stamp = TrialLog(run.store), run.store.read("stages/recommend.json")
        write_trial(log, plan, 0.2, sampler)
        assert decide(run, run.config.budgets) == before
        recommend_stage(run)
        assert run.store.read("stages/recommend.json") == stamp
        assert [each.trial for each in surface_trials(log, RANKING)] == list(range(len(CELLS)))
        found = read_run(run.store)
        assert len(found.finished) == len(CELLS)
        assert warnings(replace(found, dense=None)) == []

    def test_sees_the_ranking_s_own_plan(self, run: Run) -> None:
        before = decide(run, run.config.budgets)
        write_trial(TrialLog(run.store), PLAN, 0.2)
        assert decide(run, run.config.budgets) != before

    @pytest.mark.parametrize(("plan", "sampler"), [(FIRST, REFINE), (PLAN, REFINE), (FIRST, "map")])
    def test_nor_does_the_sampler(self, run: Run, plan: str, sampler: str) -> None:
        expected = self.study_of(run)
        write_trial(TrialLog(run.store), plan, 0.2, sampler)
        assert self.study_of(run) == expected
        assert [value for _, value in expected][1] == pytest.approx(0.8)

    def study_of(self, run: Run) -> list[tuple[dict[str, int], float | None]]:
        search = self.search_of(run)
        return [(trial.params, trial.value) for trial in search._optuna._ot_study.get_trials()]

    @staticmethod
    def search_of(run: Run, max_trials: int = len(CELLS) + 2) -> RecordedSearch:
        space = {name: optuna.distributions.IntDistribution(0, 4) for name in ("n_attn", "n_act")}
        plan = SearchPlan(
            "random", optuna.samplers.RandomSampler(0), space, lambda params: Cell(params["n_attn"], params["n_act"]),
            lambda cell: {"n_attn": cell.n_attn, "n_act": cell.n_act}, RANKING, 0, max_trials, 5,
        )  # fmt: skip
        task = TrialTask(**run.task(), recipe=run.config.trial, checkpoints="")
        return RecordedSearch(plan, TrialLog(run.store), task, lambda _: None)

    def test_a_search_that_goes_on_counts_and_resumes_its_own_trials_only(self, run: Run) -> None:
        log = TrialLog(run.store)
        write_trial(log, FIRST, 0.9, REFINE)
        log.propose(Proposed(log.next_trial, SECOND, "dense", 9, 8, REFINE, {}))
        assert [each.trial for each in ended(log)] == list(range(len(CELLS)))
        search = self.search_of(run)
        assert search.remaining == 2
        told = [search.suggest(str(n)) for n in range(3)]
        assert [isinstance(each, dict) for each in told] == [True, True, False]
        assert [each["trial"] for each in told[:2]] == [len(CELLS) + 2, len(CELLS) + 3]
        assert all(PruningPlan.parse(each["plan"]) in RANKING for each in told[:2])


def test_the_report_shows_the_refined_plan(run: Run, workers: Workers) -> None:
    workers.added = BETTER
    refine(run)
    page = Path(write_report(run.store)).read_text()
    assert f"<code>{FIRST}</code> instead of the ranking's <code>{PLAN}</code>" in page
    assert json.loads((Path(run.config.run_dir) / "recommendation.json").read_text())["budgets"][1]["refined"] is True


def test_the_run_directory_tells_a_reader_who_ran_which_trial(run: Run, workers: Workers) -> None:
    refine(run)
    log = TrialLog(RunStore(run.config.run_dir))
    assert [each.trial for each in searched(log)] == list(range(len(CELLS)))
    assert len(log.finished) > len(CELLS)


STAGES = """
import sys
from dpt_search.cli import say
from dpt_search.options import read_config
from dpt_search.run import open_run
from dpt_search.stages import STAGES
with open_run(read_config("run", sys.argv[1:]), say) as run:
    for name in ("dense", "profile", "rank", "search", "recommend", "refine"):
        STAGES[name](run)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_refinement_on_real_ray_killed_in_the_middle_of_a_swap_goes_on(tmp_path: Path) -> None:
    """The embedded model, ranked anew after every removal; two trials of a search, then two swaps."""
    sizes = {
        "data.subset": 256, "data.val_limit": 100, "trial.epochs": 3, "trial.batch_size": 32, "rank_batches": 1,
        "timing_seconds": 0.5, "max_trials": 2, "refine": 2, "ranking": "conditional", "budget": "units=4",
        "finetune_budget": "units=4", "max_concurrent": 1, "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    command = [sys.executable, "-c", STAGES, f"--config={resolve(EMBEDDED)[1]}"]
    command += [f"--{name}={value}" for name, value in sizes.items()]
    states, driver = tmp_path / "run/checkpoints", subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        while driver.poll() is None and not (states / "000002.pt").exists():
            time.sleep(0.05)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    store = RunStore(str(tmp_path / "run"))
    killed = TrialLog(store)
    assert [each.trial for each in searched(killed)] == [0, 1] and 2 not in killed.finished
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage in ("rank", "search", "recommend"):
        assert f"{stage}: already done" in done.stdout
    log, found = TrialLog(store), store.read_json("refine.json")
    assert store.read_json("ranking.json")["method"] == "conditional"
    assert [log.finished[n].plan for n in (2, 3)] == list(found["swaps"])
    assert {n: log.proposed[n] for n in killed.proposed} == killed.proposed
    assert sorted(log.proposed) == sorted(log.finished)
    assert all(len(log.finished[n].accuracies) == 3 for n in log.finished)
    row = store.read_json("recommendation.json")["budgets"][0]
    assert row["plan"] == found["chosen"]
    assert store.names("checkpoints") == []
