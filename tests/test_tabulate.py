"""The table of a real surface: its trials, their records, its shards, and what is read back."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import write_up_to_ranking
from hypothesis import given
from hypothesis import strategies as st

from dpt_search import table_records as module
from dpt_search.config import RunConfig
from dpt_search.remote import StageFailed
from dpt_search.run import configured_run
from dpt_search.store import BadRun, RunStore
from dpt_search.surface_table import read_table
from dpt_search.table_records import Job
from dpt_search.tabulate import Request, close_jobs, jobs_of, parse_shard, tabulate, wanted_cells
from search_spaces import BadInput
from search_spaces.plan import PruningPlan
from search_spaces.ratios import Cell, RatioSpace, spread
from trainables.settings import DataSettings, ModelSettings, Recipe

ROOT = Path(__file__).parents[1]
SPACE = RatioSpace(2, 3)
RANKING = {"method": "taylor", "attn": [1, 0], "act": [2, 0, 1]}
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.02)


def accuracy_of(plan: str, seed: int) -> float:
    return 0.9 - 0.05 * len(PruningPlan.parse(plan)) + seed / 1e6


class Workers:
    """What stands for Ray: trials whose accuracy is a formula; some fail, some are lost."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []
        self.failing: tuple[str, ...] = ()
        self.lost: tuple[str, ...] = ()
        self.stop_after = 10**6

    def __call__(self, wanted: object, target: str, jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        assert target == "trainables.table_trial:run_trial"
        for position, (task, _, plan, seed) in enumerate(jobs):
            assert task.threads == 1
            if len(self.done) == self.stop_after:
                raise KeyboardInterrupt
            self.done.append((plan, seed))
            yield position, self.result(plan, seed)

    def result(self, plan: str, seed: int) -> dict[str, Any] | None:
        if plan in self.lost:
            return None
        if plan in self.failing:
            return {"error": "Diverged: the loss became nan in epoch 1"}
        last = accuracy_of(plan, seed)
        return {
            "removed_accuracy": 0.1, "accuracies": [last - 0.1, last], "cost": 5.0 * (1 + len(plan)), "seconds": 2.0,
            "device": "a CPU", "versions": {"torch": "2"}, "images": {"train": 96, "val": 48}, "error": "",
        }  # fmt: skip


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    made = Workers()
    monkeypatch.setattr(module, "call_each", made)
    monkeypatch.setattr("dpt_search.run.Run.start_ray", lambda _: None)
    return made


def ranked(folder: Path) -> RunConfig:
    """Write a run up to its ranking."""
    model, data = ModelSettings("vit_tiny_patch16_224"), DataSettings("cifar10")
    config = RunConfig(model, data, run_dir=str(folder), budget="units=2", trial=RECIPE)
    costs = {"macs": 1.0, "params": 1.0, "seconds_1": 1.0, "spread_1": 0.0}
    write_up_to_ranking(config, RANKING, [{"kind": "dense", "index": -1, **costs}])
    return config


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return ranked(tmp_path / "run")


def make(config: RunConfig, cells: str = "all", seeds: int = 2, shard: tuple[int, int] = (0, 1), **more: Any) -> str:
    return tabulate(configured_run(config, lambda _: None), Request(cells, seeds, **more), shard)


def records(config: RunConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.run_dir, "table").glob("*.json")}


spaces = st.builds(RatioSpace, st.integers(0, 6), st.integers(0, 6))


@given(spaces, st.sampled_from(["all", "even"]), st.integers(1, 3), st.integers(1, 5))
def test_shards_are_disjoint_and_complete(space: RatioSpace, cells: str, seeds: int, shards: int) -> None:
    jobs = jobs_of(space, cells, seeds)
    parts = [jobs[i::shards] for i in range(shards)]
    assert sorted(j.number for part in parts for j in part) == sorted(j.number for j in jobs)
    assert len({job.record for job in jobs}) == len({job.trial_seed for job in jobs}) == len(jobs)
    expected = {cell for cell in space if cells == "all" or cell.total % 2 == 0}
    assert {(j.cell, j.seed) for j in jobs} == {(cell, seed) for cell in expected for seed in range(seeds)}
    assert len(jobs) == seeds * len(expected)


@given(spaces, st.floats(0, 20), st.integers(0, 99))
def test_further_trials_are_of_cells_close_to_the_best_of_their_line(
    space: RatioSpace, points: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    means = {cell: float(generator.uniform(0.5, 0.9)) for cell in space}
    jobs = close_jobs(space, means, points, range(2, 4))
    for cell, mean in means.items():
        short = max(means[other] for other in space.line(cell.total)) - mean
        assert [job.seed for job in jobs if job.cell == cell] == ([2, 3] if short <= 0.01 * points else [])
    assert {job.number for job in jobs} <= {job.number for job in jobs_of(space, "all", 4)}


@given(spaces)
def test_jobs_are_ordered_by_seed_and_a_request_for_more_keeps_their_numbers(space: RatioSpace) -> None:
    few, many = jobs_of(space, "even", 1), jobs_of(space, "all", 3)
    assert [job.seed for job in many] == sorted(job.seed for job in many)
    assert set(few) <= set(many)


@given(spaces)
def test_each_cell_is_as_far_as_can_be_from_those_before_it(space: RatioSpace) -> None:
    ordered = spread(space, list(space))
    assert sorted(ordered) == list(space)
    assert ordered[0] == Cell(0, 0)

    def gap(index: int, cell: Cell) -> float:
        return min(float(np.hypot(*np.subtract(space.ratios(cell), space.ratios(c)))) for c in ordered[:index])

    for index in range(1, len(ordered)):
        assert gap(index, ordered[index]) >= max(gap(index, cell) for cell in ordered[index:]) - 1e-9


def test_the_first_cells_of_a_square_are_its_corners() -> None:
    corners = {Cell(0, 0), Cell(12, 0), Cell(0, 12), Cell(12, 12)}
    assert set(wanted_cells(RatioSpace(12, 12), "all")[:4]) == corners


@pytest.mark.parametrize("text", ["", "1", "2/2", "0/0", "-1/3", "a/b", "1/2/3"])
def test_a_shard_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="cannot read the shard"):
        parse_shard(text)


def test_the_table_reads_back_with_what_was_found_and_its_provenance(config: RunConfig, workers: Workers) -> None:
    place = make(config, seeds=3)
    assert place == f"{config.run_dir}/table.parquet"
    for location in (place, config.run_dir):
        table = read_table(location)
        assert table.space == SPACE
        assert table.cells == list(SPACE)
        assert table.accuracies.shape == (12, 3)
        for (row, cell), seed in [((r, c), s) for r, c in enumerate(table.cells) for s in range(3)]:
            plan = str(PruningPlan(tuple(RANKING["attn"][: cell.n_attn]), tuple(RANKING["act"][: cell.n_act])))
            number = seed * 12 + list(SPACE).index(cell)
            assert table.accuracies[row, seed] == accuracy_of(plan, Job(cell, seed, number).trial_seed)
            assert table.costs[row] == pytest.approx(5.0 * (1 + len(plan)))
    told = read_table(place).provenance
    assert told["configuration"] == json.loads(json.dumps(asdict(config)))
    assert told["ranking"] == {"attn": [1, 0], "act": [2, 0, 1]}
    assert (told["dense_accuracy"], told["images"]) == (0.875, {"train": 96, "val": 48, "dense": 48})
    assert told["devices"] == ["a CPU"]
    assert told["failed"] == {}
    assert {"versions", "commit", "command", "cells", "seeds"} <= told.keys()


def test_the_columns_are_those_promised(config: RunConfig, workers: Workers) -> None:
    rows = pq.read_table(make(config, cells="even", seeds=1), use_threads=False)
    assert rows.schema.names == [
        "n_attn", "n_act", "plan", "seed", "removed_accuracy", "accuracies", "accuracy", "cost", "seconds", "start",
    ]  # fmt: skip
    first = rows.to_pylist()[0]
    assert (first["n_attn"], first["n_act"], first["plan"], first["start"]) == (0, 0, "dense", "dense")
    assert first["accuracies"][-1] == first["accuracy"]
    assert first["removed_accuracy"] == 0.1


def test_a_second_start_repeats_nothing_and_gives_the_same_table(config: RunConfig, workers: Workers) -> None:
    make(config)
    before, done = records(config), len(workers.done)
    Path(config.run_dir, "table.parquet").unlink()
    make(config)
    assert len(workers.done) == done == 24
    assert records(config) == before
    assert np.isfinite(read_table(config.run_dir).accuracies).all()


def test_a_start_that_was_stopped_goes_on_with_what_is_missing(config: RunConfig, workers: Workers) -> None:
    workers.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        make(config)
    before = records(config)
    assert len(before) == 5
    assert not Path(config.run_dir, "table.parquet").exists()
    workers.stop_after = 10**6
    make(config)
    assert len(workers.done) == len(set(workers.done)) == 24
    assert before.items() <= records(config).items()


def test_more_seeds_add_to_what_is_there(config: RunConfig, workers: Workers) -> None:
    make(config, cells="even", seeds=1)
    make(config, cells="all", seeds=2)
    assert len(workers.done) == len(set(workers.done)) == 24
    make(config, cells="even", seeds=1)
    assert len(workers.done) == 24
    assert len(read_table(config.run_dir).cells) == 6


def test_the_last_shard_writes_the_table(config: RunConfig, workers: Workers) -> None:
    assert make(config, shard=(0, 3)) == make(config, shard=(2, 3)) == ""
    assert not Path(config.run_dir, "table.parquet").exists()
    assert make(config, shard=(1, 3)) == f"{config.run_dir}/table.parquet"
    assert len(workers.done) == len(set(workers.done)) == 24
    assert make(config, shard=(0, 3)) == f"{config.run_dir}/table.parquet"
    assert [p.name for p in Path(config.run_dir, "table").iterdir() if p.is_dir()] == []


def test_a_failed_trial_has_its_error_and_no_accuracy(config: RunConfig, workers: Workers) -> None:
    workers.failing, workers.lost = ("attn:1",), ("act:2",)
    table = read_table(make(config))
    bad = [table.cells.index(Cell(1, 0)), table.cells.index(Cell(0, 1))]
    assert np.isnan(table.accuracies[bad]).all()
    assert np.isnan(table.costs[bad]).all()
    assert np.isfinite(np.delete(table.accuracies, bad, axis=0)).all()
    assert table.provenance["failed"]["(1,0) seed 1"].startswith("Diverged")
    assert table.provenance["failed"]["(0,1) seed 0"] == "its worker was lost"
    done = len(workers.done)
    make(config)
    assert len(workers.done) == done


def test_too_many_failures_in_a_row_stop_it_with_the_reason(config: RunConfig, workers: Workers) -> None:
    workers.failing = ("attn:0,1 act:0,1,2", "attn:0,1")
    with pytest.raises(StageFailed, match=r"^2 trials in a row failed; the last one: Diverged"):
        make(replace(config, max_failures=2))
    assert len(workers.done) == 3


def test_records_made_from_other_inputs_or_broken_are_made_again(config: RunConfig, workers: Workers) -> None:
    make(config, seeds=1)
    Path(config.run_dir, "table", "00-00-0.json").write_text('{"n_attn": ')
    # The table has that trial too, and would do.
    Path(config.run_dir, "table.parquet").unlink()
    make(config, seeds=1)
    assert len(workers.done) == 13
    RunStore(config.run_dir).write_json("ranking.json", {**RANKING, "attn": [0, 1]})
    make(config, seeds=1)
    assert len(workers.done) == 25


@pytest.mark.parametrize(
    ("name", "verb"), [("dense/dense.json", "dense"), ("costs.parquet", "profile"), ("ranking.json", "rank")]
)
def test_a_run_without_ranking_is_told_what_to_run(config: RunConfig, name: str, verb: str) -> None:
    Path(config.run_dir, name).unlink()
    with pytest.raises(BadRun, match=rf"run `dpt-search {verb}` on it first"):
        make(config)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dpt_search", *map(str, arguments)]


def start(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cells", "odd"], "--cells"),
        (["--seeds", "0"], "--seeds is 0, but must be at least 1"),
        (["--shard", "4/4"], "cannot read the shard '4/4'"),
        ([], "'nowhere' is no run directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, options: list[str], says: str) -> None:
    done = start(tmp_path, "tabulate", "nowhere", *options)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(240)
def test_a_table_on_real_ray_killed_and_gone_on_with(
    tiny: ModelSettings, tiny_data: DataSettings, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = replace(ranked(run), model=replace(tiny, kwargs={**tiny.kwargs, "depth": 2}), data=tiny_data)
    store = RunStore(str(run))
    store.write_json("run.json", {"config": asdict(config), "versions": {}, "commit": "", "created": 1.0})
    store.write_json("ranking.json", {"attn": [1, 0], "act": [0, 1]})
    driver = subprocess.Popen(command("tabulate", run, "--seeds=2"), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 100
        while len(records(config)) < 3 and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    before = records(config)
    assert len(before) >= 3
    done = start(tmp_path, "tabulate", run, "--seeds=2")
    assert done.returncode == 0, done.stderr
    assert before.items() <= records(config).items()
    assert f"table: {run}/table.parquet" in done.stdout
    assert len(before) == 18 or f"table: {18 - len(before)} trials to run" in done.stdout
    assert np.isfinite(read_table(str(run)).accuracies).all()
    assert read_table(str(run)).accuracies.shape == (9, 2)
    assert sorted(p.name for p in (run / "table").iterdir() if p.is_dir()) == []
    again = start(tmp_path, "tabulate", run, "--seeds=2")
    assert "starting Ray" not in again.stdout


def test_a_tables_own_trials_are_not_run_again_and_close_cells_get_more(config: RunConfig, workers: Workers) -> None:
    place = make(config, "even", 2)
    cells, before = len(wanted_cells(SPACE, "even")), len(workers.done)
    shutil.rmtree(Path(config.run_dir, "table"))
    make(config, "even", 2)
    assert len(workers.done) == before
    make(config, "even", 2, close_seeds=4, close=100.0)
    assert len(workers.done) == before + 2 * cells
    table = read_table(place)
    assert table.accuracies.shape == (cells, 4)
    assert np.isfinite(table.accuracies).all()
    assert table.provenance["devices"] == ["a CPU"]
    assert table.provenance["images"] == {"train": 96, "val": 48, "dense": 48}


def test_a_table_of_another_recipe_does_not_count(config: RunConfig, workers: Workers) -> None:
    make(config, "even", 1)
    shutil.rmtree(Path(config.run_dir, "table"))
    before = len(workers.done)
    make(replace(config, trial=replace(RECIPE, lr=9.0)), "even", 1)
    assert len(workers.done) == 2 * before
