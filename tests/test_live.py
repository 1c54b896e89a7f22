"""Searches compared live: the same way again, and what their decisions are worth."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_RANKING as RANKING
from conftest import tiny_prices

from dpt_search import live, table_records
from dpt_search.config import BadConfig
from dpt_search.live import SAMPLERS, Decisions, Search, decided, opened
from dpt_search.live_report import Request, judged_by_trials, judged_cells, own_table, run_live
from dpt_search.probe_stage import probe_task
from dpt_search.probe_table import write_probe
from dpt_search.remote import StageFailed
from dpt_search.run import Run, configured_run, read_ranking
from dpt_search.search_stages import decide
from dpt_search.store import BadRun, Finished, Proposed, RunStore, TrialLog
from dpt_search.tabulate import Request as Table
from dpt_search.tabulate import tabulate
from search_spaces.budgets import parse_budgets
from search_spaces.goals import unit_goals
from search_spaces.plan import PruningPlan, Ranking
from search_spaces.ratios import Cell

BUDGETS = unit_goals(RANKING.space, 2, 4)


@pytest.fixture
def run(tiny_run: Run) -> Run:
    """A run up to its ranking."""
    return tiny_run


def begun(run: Run, name: str = "map", number: int = 0, **told: Any) -> Search:
    return opened(run, RunStore(run.store.path("live")), name, number, tiny_prices(run), told)


class TestASearchOfItsOwn:
    def test_has_the_runs_ranking_and_refers_to_its_weights(self, run: Run) -> None:
        adapted = replace(run.config, adapt=replace(run.config.adapt, epochs=3))
        run = configured_run(adapted, lambda _: None)
        run.store.write("dense/model.safetensors", b"large")
        own = begun(run).run
        assert read_ranking(own) == RANKING
        assert own.model.checkpoint == run.store.path("dense/model.safetensors")
        assert not own.store.exists("dense/model.safetensors")

    def test_differs_by_seeds_and_keeps_the_data(self, run: Run) -> None:
        first, second = begun(run).run, begun(run, number=1).run
        assert len({run.reseed, first.reseed, second.reseed}) == 3
        assert first.config.seed == second.config.seed == run.config.seed
        assert probe_task(first).reseed == first.reseed
        assert probe_task(first).seed == run.config.seed

    @pytest.mark.parametrize("name", SAMPLERS)
    def test_knows_what_its_name_says(self, run: Run, name: str) -> None:
        run.config = replace(run.config, prior=["elsewhere"])
        each = begun(run, name)
        assert each.run.config.sampler == SAMPLERS[name]
        assert each.run.config.prior == (["elsewhere"] if name.startswith("map") else [])
        assert (each.upfront > 0) == (name == "map")

    def test_goes_on_as_it_began_or_is_refused(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        begun(run)
        begun(run)
        with pytest.raises(BadRun, match=r"another budget: choose another --out"):
            begun(run, budget="units=3")
        with pytest.raises(BadRun, match=r"another choice of probed cells"), monkeypatch.context() as patch:
            patch.setattr(live, "probed_cells", lambda *_: (Cell(0, 0),))
            begun(run)
        run.store.write_json("ranking.json", {"method": "taylor", "attn": [0, 1, 2, 3], "act": [0, 1, 2, 3]})
        with pytest.raises(BadRun, match=r"another ranking.json"):
            begun(run)


def add_trial(log: TrialLog, cell: Cell, accuracy: float | None, time: float, cost: float) -> None:
    number, plan = log.next_trial, str(RANKING.plan(cell))
    log.propose(Proposed(number, plan, "dense", number, 0, "map", {}, time - 1))
    accuracies = [] if accuracy is None else [accuracy]
    status = "failed" if accuracy is None else "finished"
    log.finish(Finished(number, plan, "dense", status, accuracies=accuracies, cost=cost, time=time))


class TestWhatWouldHaveBeenDecided:
    @pytest.fixture
    def each(self, run: Run) -> Search:
        each = begun(run)
        log, unit = TrialLog(each.run.store), each.prices.unit
        for time, (cell, accuracy) in enumerate([(Cell(1, 1), 0.7), (Cell(0, 2), None), (Cell(1, 3), 0.6)]):
            add_trial(log, cell, accuracy, 10.0 * (time + 1), unit)
        rows = [
            {"n_attn": c.n_attn, "n_act": c.n_act, "plan": "", "accuracy": 0.9 - c.n_attn / 10, "images": 24}
            for c in (Cell(0, 0), Cell(2, 0), Cell(0, 2), Cell(4, 0), Cell(0, 4))
        ]
        write_probe(each.run.store, rows, {"cost": 2 * unit, "epochs": 2})
        each.run.store.write_json("stages/probe.json", {"inputs": "", "finished_at": 15.0, "seconds": 1.0})
        return each

    def test_counts_the_probe_from_the_start_and_failed_trials_too(self, each: Search) -> None:
        found = decided(each, BUDGETS, 9.0)
        np.testing.assert_allclose(found.cost, [3, 3, 4, 5])
        assert found.upfront == pytest.approx(2)

    def test_in_the_end_is_what_the_run_recommends(self, each: Search) -> None:
        rows = decide(each.run, parse_budgets("units=2,4"))["budgets"]
        assert decided(each, BUDGETS, 9.0).chosen[-1] == [Cell(*row["cell"]) for row in rows]

    def test_within_a_cost_is_the_last_one_that_was_paid_for(self, each: Search) -> None:
        found = decided(each, BUDGETS, 9.0)
        assert [found.last(cost) for cost in (1, 3, 4, 4.5, 5, 99)] == [0, 1, 2, 2, 3, 3]

    def test_of_a_pure_search_has_no_hint(self, run: Run, each: Search) -> None:
        pure = begun(run, "tpe")
        add_trial(TrialLog(pure.run.store), Cell(1, 1), 0.7, 10.0, pure.prices.unit)
        before = decided(pure, BUDGETS, 9.0).chosen
        for name in ("probe.parquet", "stages/probe.json"):
            pure.run.store.write(name, each.run.store.read(name))
        found = decided(pure, BUDGETS, 9.0)
        assert (found.chosen, found.upfront) == (before, 0.0)


def last(chosen: Sequence[Cell]) -> Decisions:
    return Decisions(np.array([1.0]), [list(chosen)], None, 0.0)


def test_without_a_table_regret_is_against_the_best_judged_cell_of_the_budget() -> None:
    means = {Cell(0, 2): 0.8, Cell(2, 0): 0.7, Cell(1, 3): 0.5}
    traces = [
        judged_by_trials(means, BUDGETS, last(chosen), 5.0)
        for chosen in ([Cell(0, 2), Cell(1, 3)], [Cell(2, 0), Cell(1, 3)])
    ]
    np.testing.assert_allclose([trace.regret[0] for trace in traces], [[0, 0], [0.1, 0]], atol=1e-12)
    assert all(trace.cost == [5.0] and not trace.floor.any() for trace in traces)


class Workers:
    """What stands for Ray: trials whose accuracy grows with the units removed, attentions above all; one plan fails."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []
        self.failing = ""

    def __call__(self, wanted: object, target: str, jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        for position, (_, _, plan, seed) in enumerate(jobs):
            self.done.append((plan, seed))
            cell = PruningPlan.parse(plan).cell
            found = {"accuracies": [cell.total / 10 + cell.n_attn / 100], "cost": 1.0, "seconds": 1.0}
            yield position, {"error": "Diverged"} if plan == self.failing else {**found, "error": ""}


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    made = Workers()
    monkeypatch.setattr(table_records, "call_each", made)
    monkeypatch.setattr("dpt_search.run.Run.start_ray", lambda _: None)
    return made


def test_judging_trials_are_fresh_shared_and_run_once(run: Run, workers: Workers) -> None:
    found = judged_cells(run, RANKING, [Cell(0, 2), Cell(1, 3)], 2)
    assert found == {Cell(0, 2): pytest.approx([0.2, 0.2]), Cell(1, 3): pytest.approx([0.41, 0.41])}
    assert len(workers.done) == len({seed for _, seed in workers.done}) == 4
    judged_cells(run, RANKING, [Cell(0, 2)], 2)
    assert len(workers.done) == 4
    judged_cells(run, RANKING, [Cell(0, 2)], 3)
    assert len(workers.done) == 5
    # No search trains with a seed of theirs.
    first = [begun(run, number=number).run.reseed for number in range(2)]
    searching = {seed + trial for seed in first for trial in range(1000)}
    assert searching.isdisjoint(seed for _, seed in workers.done)


def test_a_cell_that_nothing_could_judge_ends_it(run: Run, workers: Workers) -> None:
    workers.failing = str(RANKING.plan(Cell(0, 2)))
    with pytest.raises(StageFailed, match=r"judge the cell \(0,2\)"):
        judged_cells(run, RANKING, [Cell(0, 2)], 1)


def test_a_table_of_another_ranking_or_of_one_seed_does_not_judge(run: Run, workers: Workers) -> None:
    assert own_table(run, RANKING) is None
    tabulate(run, Table("all", 1), (0, 1))
    assert own_table(run, RANKING) is None
    tabulate(run, Table("all", 2), (0, 1))
    table = own_table(run, RANKING)
    assert table is not None
    assert table.accuracies.shape == (25, 2)
    assert own_table(run, Ranking((0, 1, 2, 3), RANKING.act)) is None


def test_a_cost_that_the_probe_takes_up_is_refused(run: Run) -> None:
    with pytest.raises(BadConfig, match=r"--max-cost 1.5 is less than the probe and one trial of the dense model cost"):
        list(run_live(run, Request(["map"], max_cost=1.5)))


def test_a_run_that_cannot_tell_costs_beforehand_is_refused(run: Run) -> None:
    run.store.write_json("dense/dense.json", {"accuracy": 0.5, "images": 48})
    with pytest.raises(BadRun, match=r"dense.json of .* begin another run"):
        list(run_live(run, Request(["map"], max_cost=9.0)))


def test_a_table_judges_every_decision_on_the_way(run: Run, workers: Workers) -> None:
    tabulate(run, Table("all", 3), (0, 1))
    before = len(workers.done)
    request = Request(["map/no-probe", "tpe"], max_cost=4.0)
    for name in request.names:
        for number in range(2):
            each = begun(run, name, number, **request.told(run))
            for time, cell in enumerate([Cell(1, 1), Cell(0, 2), Cell(1, 3), Cell(4, 0)]):
                add_trial(TrialLog(each.run.store), cell, 0.9 - cell.n_attn / 9, float(time), each.prices.unit)
    title, page = list(run_live(run, request))
    assert "judged by the table's 3 seeds; noise floor 0.00 points" in title
    assert "units=2, units=4" in title
    assert len(workers.done) == before
    out = Path(run.config.run_dir, "live")
    assert page == f"page: {out}/compare.html"
    shown = (out / "compare.html").read_text()
    assert "the mean of all seeds but one in turn" in shown
    assert "data:image/png" in shown
    with (out / "live.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["strategy"], float(row["cost"])) for row in rows] == [
        (name, cost) for name in request.names for cost in (1, 2, 3, 4)
    ]
    chosen = decided(begun(run, "tpe", 1, **request.told(run)), BUDGETS, 4.0).chosen
    expected = [(2 - two.n_attn + 4 - four.n_attn) / 200 for two, four in chosen]
    np.testing.assert_allclose([float(row["mean"]) for row in rows if row["strategy"] == "tpe"], expected)
    assert expected[-1] > 0.02


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ["nonsense"]}, "no sampler 'nonsense'"),
        ({"seeds": 0}, "at least 1"),
        ({"max_cost": 0.0}, "more than 0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        Request(**{"names": ["map"], **changes}).check()


def compare(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "dpt_search", "compare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "one of both"),
        (["table.parquet", "--live", "nowhere"], "one of both"),
        (["--live", "nowhere"], "'nowhere' is no run directory"),
        (["--live", "nowhere", "--each"], "--each is for replays alone"),
        (["table.parquet", "--max-cost", 3], "--max-cost is for --live alone"),
        (["--live", "nowhere", "--workers", "1,2"], "one number"),
    ],
)
def test_bad_input_is_one_line(flags: list[object], words: str) -> None:
    done = compare(*flags)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.timeout(300)
def test_on_real_ray_at_equal_cost_and_again_without(run: Run) -> None:
    flags = ("--live", run.config.run_dir, "--samplers", "map,tpe", "--seeds", 1, "--max-cost", 4, "--judge-seeds", 1)
    done = compare(*flags, "--workers", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    live = Path(run.config.run_dir, "live")
    for name, probed in (("map", True), ("tpe", False)):
        own = RunStore(str(live / f"{name}-0"))
        each = begun(run, name, max_concurrent=1)
        trials = list(TrialLog(own).finished.values())
        spent = (each.upfront + sum(trial.cost for trial in trials)) / each.prices.unit
        assert 4 - each.prices.cheapest / each.prices.unit < spent < 5
        assert own.exists("probe.parquet") == probed == (each.upfront > 0)
        assert not own.exists("dense/model.safetensors")
        assert not own.exists("lease.json")
    assert "regret at 4" in done.stdout
    assert "no noise floor is known" in (live / "compare.html").read_text()
    judged = sorted(path.name for path in Path(run.config.run_dir, "table").glob("*.json"))
    records = {path: path.stat().st_mtime_ns for path in live.glob("*/trials/*.json")}
    again = compare(*flags, "--workers", 1)
    assert again.returncode == 0, again.stderr
    assert "starting Ray" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in live.glob("*/trials/*.json")} == records
    assert sorted(path.name for path in Path(run.config.run_dir, "table").glob("*.json")) == judged
    assert again.stdout.split("live, cost")[1] == done.stdout.split("live, cost")[1]
    assert json.loads((live / "map-0" / "run.json").read_text())["config"]["sampler"] == "map"
