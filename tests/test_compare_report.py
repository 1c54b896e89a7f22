"""The comparison as a command."""

import csv
import subprocess
import sys

import numpy as np
import pytest

from dpt_search.compare_report import budgets_of
from dpt_search.surface_table import write_table
from dpt_search.walk_table import write_walks
from dpt_search.walks import walks_of
from search_spaces.goals import unit_goals
from search_spaces.plan import Ranking
from search_spaces.ratios import RatioSpace

SPACE = RatioSpace(4, 4)


@pytest.fixture
def table(tmp_path):
    ranking, generator = Ranking(tuple(range(4)), tuple(range(4))), np.random.default_rng(0)
    rows = []
    for cell in SPACE:
        for seed in range(2):
            accuracy = 0.9 - 0.02 * cell.n_attn**2 - 0.005 * cell.n_act**2 + 0.001 * generator.standard_normal()
            rows.append(
                {
                    "n_attn": cell.n_attn, "n_act": cell.n_act, "plan": str(ranking.plan(cell)), "seed": seed,
                    "removed_accuracy": 0.5, "accuracies": [accuracy], "accuracy": accuracy, "cost": 10.0,
                    "seconds": 1.0, "start": "dense",
                }
            )  # fmt: skip
    write_table(str(tmp_path / "made.parquet"), SPACE, rows, {})
    return tmp_path / "made.parquet"


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dpt_search", "compare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_prints_a_table_and_writes_curve_and_plot(table, tmp_path):
    out = tmp_path / "out"
    done = compare(table, "--samplers", "map,grid/lines", "--seeds", 3, "--max-trials", 8, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "grid/lines" in done.stdout
    assert "25 cells, 2 seeds; units=4, units=6, together; noise floor" in done.stdout
    assert "<h2>made</h2>" in (out / "compare.html").read_text()
    with (out / "made.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["strategy"] for row in rows} == {"map", "grid/lines"}
    assert len(rows) == 2 * 16
    assert [float(row["cost"]) for row in rows[:3]] == [0.5, 1.0, 1.5]
    assert "behind map at 5" in done.stdout
    assert (out / "made.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--samplers", "nonsense"], "no strategy 'nonsense'"),
        (["--workers", "0"], "at least 1"),
        (["--workers", "many"], "write 4, or several"),
        (["--prior", "nowhere.parquet"], "no table at"),
        (["--budget", "units=99"], "at most units=8"),
    ],
)
def test_bad_input_is_one_line(table, flags, words):
    done = compare(table, *flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_several_numbers_of_workers_are_compared_by_time_and_cost(table):
    done = compare(table, "--samplers", "map/no-probe", "--seeds", 2, "--max-trials", 6, "--workers", "1,4", "--each")
    assert done.returncode == 0, done.stderr
    assert "one at a time" in done.stdout
    row = done.stdout.split("map/no-probe")[1].split()
    assert row[1] == row[4] == "/"


def test_a_table_that_is_not_there_is_one_line(tmp_path):
    done = compare(tmp_path / "nowhere.parquet")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_the_budgets_compared_by_default():
    assert budgets_of("", RatioSpace(12, 12)) == unit_goals(RatioSpace(12, 12), 4, 6, 8, 10, 12, 14, 16, 18, 20)


def test_a_table_has_no_costs_to_answer_a_speed_by():
    with pytest.raises(ValueError, match=r"budget speedup=1\.5 needs the costs of units, .*: use units=K"):
        budgets_of("units=4 speedup=1.5", RatioSpace(12, 12))


def test_recorded_walks_beside_the_table_are_replayed(table, tmp_path):
    flags = ("--samplers", "walk,walk/inherited", "--seeds", 2, "--max-trials", 12)
    done = compare(table, *flags)
    assert done.returncode == 2
    assert "no recorded walks lie beside the table" in done.stderr
    steps = [step for walk in walks_of(SPACE, 1) for step in walk]
    row = {"plan": "", "seed": 0, "removed_accuracy": 0.5, "accuracies": [], "cost": 1.0, "seconds": 1.0, "start": ""}
    rows = [
        {
            **row, "n_attn": step.cell.n_attn, "n_act": step.cell.n_act, "accuracy": 0.9 - 0.01 * step.cell.total,
            "walk": step.walk, "step": step.step, "trial": step.name, "start_trial": None, "chain_epochs": 1,
        }
        for step in steps
    ]  # fmt: skip
    write_walks(str(tmp_path / "made.walks.parquet"), SPACE, rows, {})
    done = compare(table, *flags)
    assert done.returncode == 0, done.stderr
    assert "walk/inherited" in done.stdout


def test_a_single_replay_has_no_interval(table):
    done = compare(table, "--samplers", "map/no-probe", "--seeds", 1, "--max-trials", 5)
    assert done.returncode == 0, done.stderr
    assert " to " not in done.stdout.split("map/no-probe")[1]
