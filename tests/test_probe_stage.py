"""The stage of the elastic probe: what a worker is told, what is written, and how it runs beside a search."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpt_search import probe_stage
from dpt_search.config import BadConfig, RunConfig
from dpt_search.probe_stage import ProbeBeside, is_missing, prices_of, probe, probe_task
from dpt_search.probe_table import read_probe
from dpt_search.remote import StageFailed
from dpt_search.run import Run, configured_run
from dpt_search.store import BadRun, RunStore
from search_spaces.plan import Ranking
from search_spaces.ratios import Cell, within
from trainables.devices import DeviceName
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.tasks import ProbeTask

RANKING = Ranking((2, 0, 3, 1), (1, 3, 0, 2))
ALL = tuple(RANKING.space)
LINES = tuple(tuple(RANKING.space.line(total)) for total in (2, 5))
REACHED = within(cell for line in LINES for cell in line)
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.02, distillation="soft")


def ranked(folder: Path, **changes: Any) -> Run:
    """Return a run up to its ranking."""
    model, data = ModelSettings("vit_tiny_patch16_224"), DataSettings("cifar10")
    config = RunConfig(model, data, run_dir=str(folder), budget="units=2,5", trial=Recipe(lr=0.25))
    config = replace(config, **changes)
    store = RunStore(config.run_dir)
    store.write_json("run.json", {"config": asdict(config), "versions": {}, "commit": "", "created": 1.0})
    store.write_json("ranking.json", {"method": "taylor", "attn": list(RANKING.attn), "act": list(RANKING.act)})
    return configured_run(config, lambda _: None)


class Calls:
    """What stands for a worker."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks: list[ProbeTask] = []
        monkeypatch.setattr(Run, "call", self)

    def __call__(self, target: str, task: ProbeTask, cpus: int) -> dict[str, Any]:
        assert (target, cpus) == ("trainables.probe:run_probe", task.threads)
        self.tasks.append(task)
        rows = [
            {
                "n_attn": c.n_attn,
                "n_act": c.n_act,
                "plan": str(RANKING.plan(c)),
                "accuracy": c.n_act / 10,
                "loss": 2 - c.n_act / 9,
                "images": 9,
            }
            for c in task.cells
        ]
        return {"rows": rows, "epochs": task.recipe.epochs, "cost": 12.5, "seconds": 1.0, "versions": {"torch": "2"}}


def test_a_run_without_a_probe_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, run = Calls(monkeypatch), ranked(tmp_path, probe_epochs=0)
    probe(run)
    assert calls.tasks == []
    assert not run.store.exists("stages")
    assert read_probe(run.store) is None


def test_the_stage_writes_what_it_promised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, run = Calls(monkeypatch), ranked(tmp_path, probe_epochs=3)
    probe(run)
    probe(run)
    assert len(calls.tasks) == 1
    rows = pq.read_table(tmp_path / "probe.parquet", use_threads=False)
    assert rows.schema.names == ["n_attn", "n_act", "plan", "accuracy", "loss", "images"]
    table = read_probe(run.store)
    assert table is not None
    assert len(table.cells) == RunConfig.probe_cells and set(table.cells) < set(REACHED)
    assert np.array_equal(table.accuracies, [cell.n_act / 10 for cell in table.cells])
    assert table.losses is not None
    assert np.array_equal(table.losses, [2 - cell.n_act / 9 for cell in table.cells])
    assert table.about["cost"] == 12.5
    assert {"epochs", "seconds", "seed", "versions", "draw", "sandwich", "recipe"} <= table.about.keys()


@pytest.mark.parametrize(
    ("changes", "again"),
    [({"probe_lr": 0.1}, True), ({"probe_cells": 3}, True), ({"budget": "units=3"}, True), ({"max_trials": 9}, False)],
)
def test_a_change_that_matters_makes_the_probe_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], again: bool
) -> None:
    calls = Calls(monkeypatch)
    probe(ranked(tmp_path, probe_epochs=3))
    probe(ranked(tmp_path, **{"probe_epochs": 3, **changes}))
    assert len(calls.tasks) == 1 + again


def test_its_recipe_is_a_trials_with_its_own_length_and_learning_rate(tmp_path: Path) -> None:
    made = probe_task(ranked(tmp_path, probe_epochs=3)).recipe
    assert made == Recipe(epochs=3, lr=0.25, distillation="soft")
    own = probe_task(ranked(tmp_path, probe_epochs=3, probe_lr=0.5, probe_draw="line", probe_cells=7))
    assert (own.recipe.lr, own.draw, own.lines, len(own.cells)) == (0.5, "line", LINES, 7)
    assert Cell(0, 0) in own.cells and set(own.cells) < set(REACHED)
    assert probe_task(ranked(tmp_path, probe_cells=0)).cells == tuple(REACHED)


def test_a_probe_for_one_budget_is_evaluated_off_its_line_too(tmp_path: Path) -> None:
    assert {cell.total for cell in probe_task(ranked(tmp_path, budget="units=4")).cells} == set(range(5))


class TestAProbeThatIsTooDear:
    def test_is_left_out_of_a_search_and_it_is_said(self, tiny_run: Run) -> None:
        said: list[str] = []
        run = replace(tiny_run, config=replace(tiny_run.config, probe_max_cost=0.5), say=said.append)
        assert not is_missing(run)
        assert ProbeBeside.started(run, 2).pending is None
        assert [re.sub(r"[\d.]+ trials", "N trials", line) for line in said] == [
            "probe: left out, for it would cost as much as N trials (--probe-max-cost 0.5)"
        ]

    @pytest.mark.parametrize("changes", [{"probe_max_cost": 2.0}, {"probe_max_cost": 0.0}, {"start": "probe"}])
    def test_is_made_where_it_may_cost_that_or_must_be_there(self, tiny_run: Run, changes: dict[str, Any]) -> None:
        tiny_run.config = replace(tiny_run.config, **{"probe_max_cost": 0.5, **changes})
        assert is_missing(tiny_run)

    def test_is_made_where_its_cost_is_not_known(self, tiny_run: Run) -> None:
        tiny_run.config = replace(tiny_run.config, probe_max_cost=0.5)
        tiny_run.store.write_json("dense/dense.json", {"accuracy": 0.5, "images": 48})
        assert is_missing(tiny_run)

    def test_is_made_when_asked_for_by_name(self, tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = Calls(monkeypatch)
        tiny_run.config = replace(tiny_run.config, probe_max_cost=0.5)
        said: list[str] = []
        run = replace(tiny_run, say=said.append)
        probe(run)
        assert len(calls.tasks) == 1
        assert len(ProbeBeside.started(run, 2).hints()) == 1
        assert not any("left out" in line for line in said)
        run.config = replace(run.config, probe_lr=0.5)
        assert ProbeBeside.started(run, 2).hints() == []
        assert "left out" in said[-1]

    @settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(most=st.floats(0.01, 3))
    def test_is_one_that_costs_more_than_it_may(self, tiny_run: Run, most: float) -> None:
        prices = prices_of(tiny_run)
        assert prices is not None
        tiny_run.config = replace(tiny_run.config, probe_max_cost=most)
        assert is_missing(tiny_run) == (prices.probe(probe_task(tiny_run)) <= most * prices.unit)


def test_what_is_missing_or_broken_is_said(tmp_path: Path) -> None:
    run = ranked(tmp_path, probe_epochs=1, budget="units=99")
    with pytest.raises(BadConfig, match="at most units=8"):
        probe(run)
    run.store.delete("ranking.json")
    with pytest.raises(BadRun, match="no ranking"):
        probe(run)
    run.store.write("probe.parquet", b"PAR1")
    with pytest.raises(BadRun, match=r"probe\.parquet .*: remove it"):
        read_probe(run.store)


class Beside(Calls):
    """A worker that runs the probe while something else goes on, and may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.done, self.error, self.room = False, "", True
        monkeypatch.setattr(probe_stage, "begin_in_own_room", self.begin)

    def begin(self, config: RunConfig, target: str, task: ProbeTask, cpus: float) -> Any:
        self.found = self(target, task, cpus)
        return self

    def is_done(self, seconds: float = 0.0) -> bool:
        # Waited for, it ends.
        return self.done or bool(seconds)

    def has_room(self) -> bool:
        return self.room

    def value(self) -> Any:
        if self.error:
            raise StageFailed(self.error)
        return self.found


def test_beside_the_trials_it_is_taken_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, run = Beside(monkeypatch), ranked(tmp_path, probe_epochs=3)
    beside = ProbeBeside.started(run, 2)
    assert beside.hints() == []
    worker.done = True
    (hint,) = beside.hints()
    assert hint.mean.shape == (len(ALL),)
    assert read_probe(run.store) is not None
    assert len(ProbeBeside.started(run, 2).hints()) == 1
    assert len(worker.tasks) == 1


@pytest.mark.parametrize(
    ("device", "share", "of", "left"),
    [("cpu", 1.0, 3, 2), ("cpu", 1.0, 1, 0), ("npu", 0.5, 4, 2), ("npu", 0.5, 2, 0), ("npu", 1.0, 8, 7)],
)
def test_it_goes_before_trials_and_leaves_them_the_room_that_it_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: DeviceName, share: float, of: int, left: int
) -> None:
    worker, run = Beside(monkeypatch), ranked(tmp_path, probe_epochs=3, device=device, devices_per_trial=share)
    said: list[str] = []
    run.say, worker.room = said.append, False
    beside = ProbeBeside.started(run, 2)
    assert beside.leaves(of) == 0
    worker.room = True
    assert [beside.leaves(of) for _ in range(3)] == [left] * 3
    assert sum(line.startswith("the probe has all the room there is") for line in said) == (left == 0)
    # Its node is lost: trials do not wait for it again.
    worker.room = False
    assert beside.leaves(of) == of
    worker.done = True
    assert beside.leaves(of) == of
    assert read_probe(run.store) is not None


@pytest.mark.parametrize(("concurrent", "start"), [(1, "dense"), (2, "probe")])
def test_trials_wait_for_it_where_they_run_one_at_a_time_or_start_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concurrent: int, start: str
) -> None:
    Beside(monkeypatch)
    assert len(ProbeBeside.started(ranked(tmp_path, probe_epochs=3, start=start), concurrent).hints()) == 1


def test_the_search_goes_on_without_a_probe_that_failed_unless_it_starts_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, run = Beside(monkeypatch), ranked(tmp_path, probe_epochs=3)
    said: list[str] = []
    run.say = said.append
    beside = ProbeBeside.started(run, 2)
    worker.done, worker.error = True, "a trace\nDiverged: the loss became nan"
    assert beside.hints() == []
    assert said[-1].endswith("the search goes on without it: Diverged: the loss became nan")
    with pytest.raises(StageFailed):
        ProbeBeside.started(ranked(tmp_path / "other", probe_epochs=3, start="probe"), 2)


def test_trials_that_start_from_it_have_it_whatever_the_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Beside(monkeypatch)
    ProbeBeside.started(ranked(tmp_path, probe_epochs=3, start="probe", sampler="tpe"), 2)
    assert len(worker.tasks) == 1


def test_an_earlier_probe_does_not_pass_for_one_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_before, worker = ranked(tmp_path, probe_epochs=3), Beside(monkeypatch)
    probe(probe_before)
    assert not is_missing(probe_before)
    other = ranked(tmp_path, probe_epochs=3, probe_lr=0.1)
    assert is_missing(other)
    assert ProbeBeside.started(other, 2).hints() == []
    assert len(worker.tasks) == 2


@pytest.mark.parametrize("changes", [{"probe_epochs": 0}, {"probe_epochs": 3, "sampler": "tpe"}])
def test_no_search_that_has_no_use_for_it_begins_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    worker = Beside(monkeypatch)
    beside = ProbeBeside.started(ranked(tmp_path, **changes), 2)
    beside.finish()
    assert (worker.tasks, beside.hints()) == ([], [])


@pytest.mark.timeout(240)
def test_the_verb_on_real_ray(tiny: ModelSettings, tiny_data: DataSettings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranked(run, model=tiny, data=tiny_data, trial=RECIPE)
    command = [sys.executable, "-m", "dpt_search", "probe", str(run), "--probe-epochs"]
    done = subprocess.run([*command, "1", "--probe-sandwich=true"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (run / "probe" / "model.safetensors").stat().st_size > 0
    table = read_probe(RunStore(str(run)))
    assert table is not None
    assert len(table.cells) == RunConfig.probe_cells
    assert ((table.accuracies >= 0) & (table.accuracies <= 1)).all()
    assert (table.about["epochs"], table.about["sandwich"]) == (1, True)
    assert json.loads((run / "run.json").read_text())["config"]["probe_epochs"] == 1
    bad = subprocess.run([*command, "-1"], capture_output=True, text=True, timeout=60)
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert "probe_epochs is -1, but must be at least 0" in bad.stderr
