"""The measurement of plan regret: which plans, how they are judged, and a small one from end to end."""

import importlib
import json
import os
import subprocess
import sys
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpt_search.options import read_config
from search_spaces import BadInput
from search_spaces.plan import Ranking
from search_spaces.ratios import Cell

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "plan_regret.py"
sys.path.insert(0, str(SCRIPT.parent))
module, verdict = importlib.import_module("plan_regret"), importlib.import_module("plan_verdict")
IMPORTANCE = [0.1, 0.2, 0.3, 0.4, 0.5]


def as_recorded(attn: tuple[int, ...], act: tuple[int, ...]) -> dict[str, object]:
    return {"attn": list(attn), "act": list(act), "importance": {"attn": IMPORTANCE, "act": IMPORTANCE}}


RANKINGS = [
    as_recorded((4, 3, 2, 1, 0), (4, 2, 3, 0, 1)), as_recorded((3, 4, 2, 1, 0), (2, 4, 3, 0, 1)),
    as_recorded((0, 1, 2, 3, 4), (0, 1, 2, 3, 4)), as_recorded((1, 0, 2, 3, 4), (0, 1, 2, 3, 4)),
]  # fmt: skip
COUNTS = module.Counts(random=9, greedy=2, joint=3, seeds=2)
cells = st.builds(Cell, st.integers(0, 5), st.integers(0, 5))


@given(cells)
def test_all_plans_are_of_the_cell_and_as_many_as_asked_for(cell: Cell) -> None:
    plans = module.plans_of(cell, RANKINGS, 0, COUNTS)
    assert {plan.cell for of in plans.values() for plan in of} == {cell}
    there = comb(5, cell.n_attn) * comb(5, cell.n_act)
    sizes = {"ranking": 1, "conditional": 1, "random": min(9, there), "greedy": 2, "joint": 3}
    assert {kind: len(of) for kind, of in plans.items()} == sizes
    assert len(set(plans["random"])) == len(plans["random"])
    assert plans["ranking"] == [Ranking((4, 3, 2, 1, 0), (4, 2, 3, 0, 1)).plan(cell)]
    assert plans["greedy"][0] == Ranking((0, 1, 2, 3, 4), (0, 1, 2, 3, 4)).plan(cell)
    assert plans == module.plans_of(cell, RANKINGS, 0, COUNTS)


@given(cells)
def test_joint_plans_take_both_kinds_from_the_same_blocks(cell: Cell) -> None:
    first, *_ = plans = module.plans_of(cell, RANKINGS, 0, COUNTS)["joint"]
    for plan in plans:
        assert len(set(plan.attn) & set(plan.act)) == min(cell.n_attn, cell.n_act)
    # Blocks by the sum of both importances, in tenths: 4 (1 + 1), 2 (3 + 2) and 3 (2 + 3), 0 (5 + 4) and 1 (4 + 5).
    if cell.n_attn == 1:
        assert first.attn == (4,)


def test_a_cell_that_is_too_large_is_refused() -> None:
    with pytest.raises(BadInput, match=r"cell \(6,0\) removes more units than there are"):
        module.check_cells([Cell(5, 5), Cell(6, 0)], RANKINGS[0])
    for text in ("4", "a,b", "1,-1"):
        with pytest.raises(BadInput, match="cannot read the cell"):
            module.cell_of(text)


def test_sizes_are_laid_over_the_embedded_run() -> None:
    config, other = read_config("run", []), module.configuration(128, 1, 100, 2)
    sizes = config.data.subset, config.trial.epochs, config.data.val_limit, config.rank_batches
    assert module.configuration(*sizes) == config
    assert (other.data.subset, other.trial.epochs, other.data.val_limit, other.rank_batches) == (128, 1, 100, 2)
    assert other.model == config.model
    with pytest.raises(BadInput, match=r"trial\.epochs is 0"):
        module.configuration(128, 0, 100, 2)


def test_regret_without_noise_is_the_distance_to_the_best() -> None:
    table = np.array([[0.80, 0.80], [0.83, 0.83], [0.70, 0.70]])
    found = verdict.plan_regret(table, 0.0)
    assert (found.value, found.error) == (pytest.approx(0.03), 0.0)
    assert verdict.plan_regret(table[::-1], 0.0).value == pytest.approx(0.13)
    assert verdict.plan_regret(table[[1, 0, 2]], 0.01) == verdict.Estimate(0.0, 0.0)


@pytest.mark.parametrize("seeds", [2, 3])
def test_regret_is_not_flattered_by_choosing_and_its_error_is_honest(seeds: int) -> None:
    rng, noise, gap = np.random.default_rng(0), 0.01, 0.05
    equal = [verdict.plan_regret(0.8 + noise * rng.normal(size=(30, seeds)), noise) for _ in range(2000)]
    values, errors = np.array([each.value for each in equal]), np.array([each.error for each in equal])
    # Had the seeds that chose judged too, thirty equal plans would show a regret of about one and a half noises.
    assert abs(values.mean()) < 4 * noise / np.sqrt(2000)
    assert values.std() == pytest.approx(np.sqrt(np.mean(errors**2)), rel=0.15)
    truth = np.where(np.arange(30) == 7, 0.8 + gap, 0.8)[:, None]
    clear = [verdict.plan_regret(truth + noise * rng.normal(size=(30, seeds)), noise).value for _ in range(1000)]
    assert np.mean(clear) == pytest.approx(gap, abs=0.1 * gap)


def records(kinds: dict[str, dict[str, list[float | None]]]) -> dict[str, list[list[dict[str, object]]]]:
    return {
        kind: [
            [{"plan": plan, "error": "" if a else "Diverged", "accuracies": [0.5, a]} for a in accuracies]
            for plan, accuracies in of.items()
        ]
        for kind, of in kinds.items()
    }


def test_a_cell_says_how_every_kind_did() -> None:
    kinds = {
        "ranking": {"attn:0": [0.80, 0.82]}, "conditional": {"attn:0": [0.80, 0.82]},
        "random": {"attn:1": [0.90, 0.90], "attn:2": [0.70, 0.70], "attn:3": [0.99, None]},
    }  # fmt: skip
    found = verdict.judged(records(kinds), 0.01)
    assert (found["rank"], found["of"], found["failed"]) == (2, 3, ["attn:3"])
    assert found["regret"]["value"] == pytest.approx(0.09)
    assert found["kinds"]["conditional"]["over_ranking"] == {"value": pytest.approx(0), "error": 0.0}
    random = found["kinds"]["random"]
    assert (random["plans"], random["best"]) == (2, pytest.approx(0.9))
    assert random["mean"]["value"] == pytest.approx(0.8)
    # Four trials of one kind against two of the other.
    assert random["over_ranking"]["error"] == pytest.approx(0.01 * np.sqrt(1 / 4 + 1 / 2))
    assert "plan regret +9.00 ± 1.00 points; the ranking's plan is number 2 of 3" in verdict.said("(1,0)", found)
    lost = verdict.judged(records({"ranking": {"attn:0": [None, 0.8]}}), 0.01)
    assert "no answer; left out, because a trial failed: attn:0" in verdict.said("(1,0)", lost)
    json.dumps([found, lost], allow_nan=False)


def test_noise_is_that_of_a_trial_about_its_plan() -> None:
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.5, 0.9, (2000, 1)) + 0.01 * rng.normal(size=(2000, 2))
    assert verdict.noise_of(rows.tolist()) == pytest.approx(0.01, rel=0.05)
    assert verdict.noise_of([[0.5, float("nan")], [0.7, 0.7]]) == 0.0


def test_a_trial_has_its_own_seed_whatever_else_is_asked_for() -> None:
    seeds = {module.trial_seed(f"attn:{i},{j}", s) for i in range(12) for j in range(i) for s in range(3)}
    assert len(seeds) == 66 * 3
    assert max(seeds) < 2**32 - 10**6
    assert module.record_name("attn:0,3 act:8", 1) != module.record_name("attn:0 act:3,8", 1)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_small_measurement_and_a_start_that_goes_on(tmp_path: Path) -> None:
    counts = ["--cells", "1,1", "--random", "2", "--greedy", "1", "--joint", "1"]
    sizes = ["--subset", "128", "--epochs", "1", "--val-limit", "100", "--rank-batches", "1"]
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    command = [sys.executable, str(SCRIPT), *counts, *sizes, *places]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(1,1): plan regret" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["about"]["cpu"] and found["about"]["torch"] and found["about"]["cores"]
    assert found["settings"]["images"] == {"train": 128, "val": 100}
    plans = found["cells"]["(1,1)"]["plans"]
    assert [each["kind"] for each in plans] == ["ranking", "conditional", "random", "random", "greedy", "joint"]
    assert all(0 <= accuracy <= 1 for each in plans for accuracy in each["accuracies"])
    kept = sorted((tmp_path / "work").rglob("trials/*.json"))
    assert len(kept) == 2 * len({each["plan"] for each in plans})
    before = {path: path.read_bytes() for path in kept[1:]}
    kept[0].unlink()
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "1 trials to run" in again.stdout
    assert {path: path.read_bytes() for path in kept[1:]} == before
    assert json.loads((tmp_path / "out.json").read_text())["cells"] == found["cells"]
