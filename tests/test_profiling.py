"""The profile: what units save, how far off that may be, when measuring ends, and compiled models."""

import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dpt_search import run as runs
from dpt_search.costs_table import read_costs, read_warnings, told, write_costs
from dpt_search.decisions import measure
from dpt_search.run import Run
from dpt_search.store import RunStore
from search_spaces.plan import PruningPlan, Unit
from trainables import profiling
from trainables.profiling import Step, profile, saving
from trainables.tasks import ProfileTask
from trainables.timing import FEWEST, MOST, calls_within, clock_of

NOTHING, HALF, LEFT, ALL = (
    PruningPlan(),
    PruningPlan((0, 1)),
    PruningPlan((0, 1), (0,)),
    PruningPlan((0, 1, 2, 3), (0,)),
)
STEPS = [Step(NOTHING, HALF, 2), Step(LEFT, ALL, 2)]
COLUMNS = {plan: column for column, plan in enumerate((NOTHING, HALF, LEFT, ALL))}


def seconds_of(first: float, last: float, noise: float, rounds: int, seed: int = 0) -> np.ndarray:
    """Rounds in which two units save `first` each of a whole model and `last` each where all else is gone."""
    true = np.array([1.0, 1 - 2 * first, 0.5, 0.5 - 2 * last])
    return true + noise * np.random.default_rng(seed).standard_normal((rounds, 4))


def test_a_unit_saves_the_mean_of_both_ends_and_their_difference_is_part_of_the_spread():
    found = saving(seconds_of(0.04, 0.03, 0.0, 9), STEPS, COLUMNS)
    assert (found.seconds, found.noise, found.apart) == pytest.approx((0.035, 0.0, 0.005))
    found = saving(seconds_of(0.04, 0.03, 0.0, 9), STEPS[:1], COLUMNS)
    assert (found.seconds, found.apart) == pytest.approx((0.04, 0.0))


def test_the_noise_is_that_of_the_median_and_covers_it():
    few, many = (saving(seconds_of(0.04, 0.04, 0.01, rounds), STEPS, COLUMNS).noise for rounds in (50, 800))
    assert 0.15 < many / few < 0.4  # a quarter
    off = [saving(seconds_of(0.04, 0.04, 0.01, 60, seed), STEPS, COLUMNS) for seed in range(200)]
    covered = np.mean([abs(each.seconds - 0.04) <= each.noise for each in off])
    assert 0.9 <= covered < 1.0


def test_rounds_go_on_until_they_are_enough_or_the_time_is_used_up():
    device, asked = torch.device("cpu"), []

    def enough(seconds: np.ndarray) -> bool:
        asked.append(seconds.shape)
        return len(seconds) >= 20

    assert len(calls_within(60.0, [lambda: None], device, fewest=5, enough=enough)) == 20
    assert asked == [(5, 1), (10, 1), (15, 1), (20, 1)]
    assert len(calls_within(60.0, [lambda: None], device)) == MOST
    assert len(calls_within(0.0, [lambda: None], device, fewest=3, enough=lambda _: False)) == 3
    begun = time.perf_counter()
    assert len(calls_within(0.2, [lambda: time.sleep(0.01)], device, enough=lambda _: False)) >= FEWEST
    assert 0.2 <= time.perf_counter() - begun < 5


def test_one_thread_is_not_charged_for_what_others_take():
    (seconds,) = calls_within(0.0, [lambda: time.sleep(0.05)], torch.device("cpu"), fewest=1)[0]
    assert seconds < 0.04
    torch.set_num_threads(2)
    try:
        assert clock_of(torch.device("cpu")) is time.perf_counter
    finally:
        torch.set_num_threads(1)


@pytest.fixture
def task(tiny, tiny_data) -> ProfileTask:
    return ProfileTask(tiny, tiny_data, 0, "cpu", 1, "zero", batches=(2,), seconds=0.5)


def test_what_stays_unsure_is_measured_for_longer_and_said_in_one_line(task, monkeypatch):
    monkeypatch.setattr(profiling, "PRECISE", 0.0)
    found = profile(task)
    assert found["rounds"]["2"] > FEWEST
    (warning,) = found["warnings"]
    assert "4 attn at batch 2 to" in warning and "4 act at batch 2 to" in warning and "\n" not in warning
    monkeypatch.setattr(profiling, "PRECISE", 10.0)
    found = profile(task)
    assert (found["rounds"], found["warnings"]) == ({"2": FEWEST}, [])
    assert all(row["spread_2"] > 0 for row in found["rows"])


def test_predictions_hold_where_all_is_removed(task):
    found = profile(replace(task, batches=(64,), seconds=2.0))
    whole, *units = found["rows"]
    left = 1 - sum(row["seconds_64"] for row in units) / whole["seconds_64"]
    assert 0.02 < left < 0.5  # embedding, norms and merged layers: some of the model, not most of it


def test_costs_say_how_they_were_measured(tmp_path):
    store = RunStore(str(tmp_path))
    one = {"macs": 10.0, "params": 5, "seconds_8": 0.1, "spread_8": 0.01}
    rows = [
        {"kind": "dense", "index": -1, **one, "seconds_8": 1.0},
        *({"kind": "attn", "index": i, **one} for i in (0, 3)),
    ]
    write_costs(store, "Xeon", rows)
    costs = read_costs(store)
    assert costs is not None and not costs.compiled and read_warnings(store) == []
    write_costs(store, "Xeon", rows, {"compiled": True, "warnings": ["unsure"]})
    costs = read_costs(store)
    assert costs is not None and costs.compiled and costs.device == "Xeon"
    assert costs.spreads[Unit("attn", 3)] == {8: 0.01}
    assert read_warnings(store) == ["unsure"]
    dense, line = told(costs)
    assert dense.endswith("timed on Xeon, models compiled")
    assert line == "batch 8: dense 1000 ms; of that, removing saves: each of 2 attn 10.00% ± 1.00%"


@pytest.mark.parametrize("compiled", [True, False])
def test_plans_near_a_limit_are_timed_as_the_profile_was(tiny_run: Run, monkeypatch, compiled: bool) -> None:
    given: list[Any] = []
    monkeypatch.setattr(runs, "call", lambda _, target, task, **rest: given.append(task) or {})
    monkeypatch.setattr(Run, "start_ray", lambda self: None)
    costs = [{"kind": "dense", "index": -1, "macs": 1.0, "params": 1, "seconds_1": 1.0, "spread_1": 0.0}]
    write_costs(tiny_run.store, "Xeon", costs, {"compiled": compiled})
    measure(tiny_run, [PruningPlan((0,))], "a plan")
    assert given[0].compiled is compiled


def test_no_compiler_is_one_line_before_anything_is_measured(tiny, tiny_data, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    code = (
        "import sys; from search_spaces import BadInput; from trainables.profiling import profile\n"
        "from trainables.settings import DataSettings, ModelSettings; from trainables.tasks import ProfileTask\n"
        f"task = ProfileTask({tiny!r}, {tiny_data!r}, 0, 'cpu', 1, 'zero', compiled=True)\n"
        "try:\n    profile(task)\nexcept BadInput as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("--compiled, or a recipe with compile, needs a compiler that torch can use")
    assert done.stdout.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_variant_per_kind_and_shape_is_compiled(task):
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    found = profile(replace(task, compiled=True))
    # The compiler's own check, the dense model, and the two kinds.
    assert counters["stats"]["unique_graphs"] == 4
    assert found["compiled"] and found["compile_seconds"] > 0
    assert all(row["seconds_2"] != 0 for row in found["rows"])
