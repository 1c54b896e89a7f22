"""The published walks with inheritance: what starts from what, what is recorded, and what a replay makes of it."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from conftest import write_up_to_ranking
from hypothesis import given
from hypothesis import strategies as st

from dpt_search import walks as module
from dpt_search.compare import replay
from dpt_search.config import RunConfig
from dpt_search.map_sampler import published_walks
from dpt_search.remote import StageFailed
from dpt_search.run import configured_run
from dpt_search.store import BadRun, RunStore
from dpt_search.strategies import INHERITED, InheritedWalk
from dpt_search.surface_table import SurfaceTable
from dpt_search.walk_table import WalkTrial, read_walks
from dpt_search.walks import tabulate_walks, walks_of
from search_spaces.goals import unit_goals
from search_spaces.plan import Attention, PruningPlan
from search_spaces.ratios import Cell, RatioSpace
from trainables.engine import evaluate
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.table_trial import run_trial
from trainables.workspace import Workspace

RANKING = {"method": "taylor", "attn": [1, 0, 3, 2], "act": [2, 0, 1, 3]}
SPACE = RatioSpace(4, 4)
RECIPE = Recipe(epochs=1, batch_size=32, lr=0.02)


class Workers:
    """What stands for Ray: the same trials, in this process; kills the driver after some, loses those of a plan."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.stop_after = 10**6
        self.lost = ""

    def __call__(self, wanted: object, target: str, jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        assert target == "trainables.table_trial:run_trial"
        for position, job in enumerate(jobs):
            if len(self.told) == self.stop_after:
                raise KeyboardInterrupt
            self.told.append(job)
            yield position, None if job[2] == self.lost else run_trial(*job)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    made = Workers()
    monkeypatch.setattr(module, "call_each", made)
    monkeypatch.setattr("dpt_search.run.Run.start_ray", lambda _: None)
    return made


@pytest.fixture
def config(tmp_path: Path, tiny: ModelSettings, tiny_data: DataSettings) -> RunConfig:
    """A run up to its ranking."""
    made = RunConfig(tiny, tiny_data, run_dir=str(tmp_path / "run"), budget="units=2", trial=RECIPE)
    costs = [{"kind": "dense", "index": -1, "macs": 1.0, "params": 1.0, "seconds_1": 1.0}]
    write_up_to_ranking(made, RANKING, costs)
    return made


def make(config: RunConfig, seeds: int = 1) -> str:
    return tabulate_walks(configured_run(config, lambda _: None), seeds)


def records(config: RunConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.run_dir, "walks").glob("*.json")}


@given(st.builds(RatioSpace, st.integers(0, 12), st.integers(0, 12)), st.integers(1, 3))
def test_walks_are_the_published_samples_each_nested_in_the_next(space: RatioSpace, seeds: int) -> None:
    walks = walks_of(space, seeds)
    steps = [step for walk in walks for step in walk]
    for seed in range(seeds):
        assert [step.cell for step in steps if step.seed == seed] == published_walks(space)
    assert len({step.record for step in steps}) == len({step.trial_seed for step in steps}) == len(steps)
    for walk in walks:
        for before, after in pairwise(walk):
            assert (after.step, after.cell.total) == (before.step + 1, before.cell.total + 1)
            assert before.cell.n_attn <= after.cell.n_attn
            assert before.cell.n_act <= after.cell.n_act


@pytest.mark.parametrize("attention", get_args(Attention))
def test_every_trial_starts_from_the_weights_of_the_one_before_it(
    config: RunConfig, workers: Workers, monkeypatch: pytest.MonkeyPatch, attention: Any
) -> None:
    config = replace(config, attention=attention)
    monkeypatch.setattr(RunStore, "delete", lambda *_: None)
    rows = {row["trial"]: row for row in pq.read_table(make(config), use_threads=False).to_pylist()}
    started = {Path(job[4]).stem or job[2]: job for job in workers.told}
    for trial, row in rows.items():
        task = started[trial if trial in started else row["plan"]][0]
        assert (row["start_trial"] is None) == (task.start == "") == (row["step"] == 0)
        assert row["chain_epochs"] == row["step"] + 1
        if row["start_trial"] is None:
            continue
        before = rows[row["start_trial"]]
        # What went before does not fade again.
        assert task.start_plan == before["plan"]
        assert Path(task.start).stem == before["trial"] == f"{row['walk']}-0-{row['step'] - 1:02d}"
        workspace = Workspace(task)
        # With those weights the plan before is what that trial ended with, to the last image.
        same = workspace.pruned(PruningPlan.parse(before["plan"]), task.start)
        images = workspace.images("val")
        assert float(evaluate(same, images, torch.device("cpu")).mean()) == before["accuracy"]
        pruned = workspace.pruned(PruningPlan.parse(row["plan"]), task.start)
        assert float(evaluate(pruned, images, torch.device("cpu")).mean()) == row["removed_accuracy"]
        own = safetensors.torch.load(Path(task.start).read_bytes())
        assert own.keys() == workspace.dense.state_dict().keys()


def test_walks_are_a_table_of_their_own_and_leave_no_weights(config: RunConfig, workers: Workers) -> None:
    place = make(config, seeds=2)
    assert place == f"{config.run_dir}/walks.parquet"
    assert not Path(config.run_dir, "table.parquet").exists()
    assert not Path(config.run_dir, "table").exists()
    assert [path.name for path in Path(config.run_dir, "walks").iterdir() if path.suffix != ".json"] == []
    first, second = read_walks(place)
    assert [trial.cell for trial in first] == [trial.cell for trial in second] == published_walks(SPACE)
    assert [trial.accuracy for trial in first] != [trial.accuracy for trial in second]
    make(config, seeds=2)
    assert len(workers.told) == 2 * len(published_walks(SPACE))


def test_killed_walks_go_on_as_they_would_have(config: RunConfig, workers: Workers, tmp_path: Path) -> None:
    undisturbed = replace(config, run_dir=str(tmp_path / "undisturbed"))
    for name in ("run.json", "dense/dense.json", "ranking.json", "costs.parquet"):
        RunStore(undisturbed.run_dir).write(name, RunStore(config.run_dir).read(name))
    expected = read_walks(make(undisturbed))
    for stop in (2, 2, 3):
        workers.told, workers.stop_after = [], stop
        before = records(config)
        with pytest.raises(KeyboardInterrupt):
            make(config)
        assert before.items() <= records(config).items()
    workers.stop_after = 10**6
    assert read_walks(make(config)) == expected


def test_a_walk_ends_where_a_trial_fails(config: RunConfig, workers: Workers) -> None:
    workers.lost = "attn:0,1"
    walks = read_walks(make(config))
    assert Cell(1, 0) in [trial.cell for trial in walks[0]]
    assert Cell(2, 0) not in [trial.cell for trial in walks[0]]
    assert Cell(3, 0) not in [trial.cell for trial in walks[0]]
    assert Cell(0, 3) in [trial.cell for trial in walks[0]]
    done = len(workers.told)
    make(config)
    assert len(workers.told) == done
    with pytest.raises(StageFailed, match="its worker was lost"):
        make(replace(config, max_failures=1), seeds=2)


def test_weights_that_are_gone_are_said(config: RunConfig, workers: Workers) -> None:
    workers.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        make(config)
    for path in Path(config.run_dir, "walks").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(BadRun, match=r"the weights of trial .* are gone"):
        make(config)


def surface() -> SurfaceTable:
    cells = list(SPACE)
    means = np.array([0.9 - 0.01 * cell.n_attn**2 - 0.002 * cell.n_act**2 for cell in cells])
    return SurfaceTable(SPACE, cells, means[:, None] + np.zeros(2), np.full(len(cells), 5.0), {})


def recorded(accuracy: Any) -> list[WalkTrial]:
    return [
        WalkTrial(step.name, walk[step.step - 1].name if step.step else None, step.cell, accuracy(step.cell), 5.0)
        for walk in walks_of(SPACE, 1)
        for step in walk
    ]


class TestTheReplay:
    def test_decides_by_what_was_recorded_and_not_by_common_starts(self) -> None:
        # Recorded the other way round: attentions seem to cost nothing.
        walk = recorded(lambda cell: 0.9 - 0.002 * cell.n_attn**2 - 0.01 * cell.n_act**2)
        budgets = unit_goals(SPACE, 2)
        told = {"seed": 0, "workers": 1, "max_trials": 40}
        common = replay(surface(), "walk", budgets, **told)
        inherited = replay(surface(), INHERITED, budgets, walks=[walk], **told)
        assert common.regret[-1, 0] < 1e-9 < 0.005 < inherited.regret[-1, 0]
        assert inherited.cost[-1] == len(walk)

    def test_a_trial_waits_for_the_one_before_it(self) -> None:
        walk = recorded(lambda cell: 0.9 - 0.01 * cell.total - 0.001 * cell.n_act)
        told = {"seed": 0, "max_trials": 40, "walks": [walk]}
        many = replay(surface(), INHERITED, unit_goals(SPACE, 2), workers=16, **told)
        longest = max(len(each) for each in walks_of(SPACE, 1))
        assert many.time[-1] == longest
        assert many.cost[-1] == len(walk)

    def test_without_recorded_walks_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no recorded walks"):
            replay(surface(), INHERITED, unit_goals(SPACE, 2), seed=0, workers=1, max_trials=9)

    def test_is_known_by_its_name(self) -> None:
        from dpt_search.strategies import STRATEGIES

        assert STRATEGIES[INHERITED] is InheritedWalk


@pytest.mark.timeout(240)
def test_the_verb_on_real_ray(config: RunConfig) -> None:
    command = [sys.executable, "-m", "dpt_search", "tabulate", config.run_dir, "--walks", "--seeds=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"table: {config.run_dir}/walks.parquet" in done.stdout
    walks = read_walks(f"{config.run_dir}/walks.parquet")
    assert [trial.cell for trial in walks[0]] == published_walks(SPACE)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "starting Ray" not in again.stdout
