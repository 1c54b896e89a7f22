"""The command line: one line and exit code 2 for bad input, and quick verbs that import neither torch nor ray."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dpt_search.config import BadConfig, RunConfig
from dpt_search.costs_table import write_costs
from dpt_search.options import DESCRIPTIONS
from dpt_search.run import open_run
from dpt_search.store import Finished, Proposed, RunStore, TrialLog
from trainables.settings import DataSettings, ModelSettings

ROOT = Path(__file__).parent.parent
VERBS = ("resolve", "robustness", "doctor", "tabulate", *DESCRIPTIONS)
CONFIG = RunConfig(
    ModelSettings("vit_tiny_patch16_224"), DataSettings("cifar10"), run_dir="run", budget="units=2,4", max_trials=4
)
PLANS = ("attn:0 act:3", "attn:0,1", "act:2,3", "attn:0,1 act:2,3")
HEAVY = """
import sys
from dpt_search.cli import main
for words in sys.argv[1:]:
    try:
        code = main(words.split())
    except SystemExit as left:
        code = left.code
    loaded = {"torch", "ray", "timm", "torchvision"} & sys.modules.keys()
    if code or loaded:
        sys.exit(f"{words}: exit code {code}, imported {sorted(loaded)}")
"""


def start(*argv: str, cwd: Path, root: Path | None = ROOT) -> "subprocess.CompletedProcess[str]":
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if root is not None:
        env["PYTHONPATH"] = str(root)
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=50)


def refused(folder: Path, *argv: str) -> str:
    """Run the program on bad input; return its one line."""
    before = sorted(folder.rglob("*"))
    begin = time.monotonic()
    done = start("-m", "dpt_search", *argv, cwd=folder)
    # An idle machine takes less than a second; a busy one gets ten times that.
    assert time.monotonic() - begin < 10
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("dpt-search: ")
    assert done.stdout == ""
    assert sorted(folder.rglob("*")) == before
    return done.stderr.removeprefix("dpt-search: ").strip()


def write_run(folder: Path, *, costs: bool = False, compiled: bool = False) -> RunStore:
    """Write the run of a model with four blocks, up to the search's end."""
    store = RunStore(str(folder))
    told = {"config": asdict(CONFIG), "versions": {}, "commit": "", "created": 1.0, "command": ""}
    store.write_json("run.json", told)
    order = {"attn": [0, 1, 2, 3], "act": [3, 2, 1, 0]}
    store.write_json("ranking.json", {**order, "importance": {"attn": [1, 2, 3, 4], "act": [4, 3, 2, 1]}})
    store.write_json("stages/rank.json", {"stage": "rank", "inputs": "", "seconds": 1.0, "finished_at": 1.0})
    log = TrialLog(store)
    for trial, plan in enumerate(PLANS):
        log.propose(Proposed(trial, plan, "dense", seed=trial, seen=trial, sampler="map", params={}))
        log.finish(Finished(trial, plan, "dense", "finished", 0.5, [0.6, 0.7 - trial / 50], cost=1.0, seconds=9.0))
    if costs:
        names, zero = ("macs", "params", "seconds_1", "seconds_64"), {"spread_1": 0.0, "spread_64": 0.0}
        rows = [{"kind": "dense", "index": -1, **dict(zip(names, (1e7, 6e5, 6e-3, 5e-2), strict=True)), **zero}]
        for kind, saved in {"attn": (3e5, 2e4, 1e-3, 1e-2), "act": (5e5, 3e4, 5e-4, 5e-3)}.items():
            rows += [{"kind": kind, "index": i, **dict(zip(names, saved, strict=True)), **zero} for i in range(4)]
        write_costs(store, "a CPU", rows, {"compiled": compiled})
    return store


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("serach", "no verb 'serach': use one of run, resolve"),
        ("run --no-such-option 3", "--no-such-option 3 (see dpt-search run --help)"),
        ("run --max-trials -1", "max_trials is -1, but must be at least 1"),
        ("run --budget faster", "unknown budget 'faster'; write units=8"),
        ("run --model.name x --data.path y --budget units=a,b", "cannot read budget 'units=a,b' (expected units=8"),
        ("run --config nowhere.yaml", "--config: File does not exist"),
        ("run --config broken.yaml", "parsing config"),
        ("run --finetune-budget units=7", "finetune_budget 'units=7' is not one of budget 'units=4,6,8,10': name one"),
        ("run --device tpu", "--device: expected one of 'cpu', 'cuda', 'npu'"),
        ("run --run-dir nosuch://bucket/run", "run directory: cannot open 'nosuch://bucket/run'"),
        ("run --run-dir file.txt/run", "'file.txt/run' (Not a directory): choose another --run-dir"),
        ("rank", "required: run (see dpt-search rank --help)"),
        ("resolve nowhere --budget units=2", "'nowhere' is no run directory: it has no run.json"),
        ("resolve nowhere", "'nowhere' is no run directory: it has no run.json"),
        ("run --budget speedup=0.9", "a speedup is at least 1"),
        ("run --keep attn:all", "cannot read the plan 'attn:all'"),
        ("robustness", "robustness of which run? Give its directory, or --preset hetdpt"),
        ("robustness nowhere", "'nowhere' is no run directory: it has no run.json"),
        ("robustness nowhere.parquet", "no table at 'nowhere.parquet'"),
        ("robustness nowhere --noise -0.1", "--noise is -0.1 points, but must be 0 or more"),
        ("robustness nowhere --draws 0", "--draws is 0, but must be at least 1"),
        ("robustness --preset hetdtp", "no preset 'hetdtp': use hetdpt"),
        ("robustness --preset hetdpt --budget units=25", "at most units=24"),
        ("robustness --preset hetdpt --budget all", "unknown budget 'all'; write units=8"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do_and_creates_nothing(tmp_path: Path, argv: str, says: str) -> None:
    (tmp_path / "broken.yaml").write_text("model: [\n")
    (tmp_path / "file.txt").write_text("in the way")
    assert says in refused(tmp_path, *argv.split())


def test_a_run_directory_of_another_configuration_is_refused_by_field(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    line = refused(tmp_path, "run", "--run-dir=run", "--trial.lr=0.5")
    assert line.startswith("trial.lr is 0.5, but the run in 'run' was started with 0.0005")
    assert "choose another --run-dir" in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--budget": "units=9"}, "at most units=8"),
        ({"--budget": "units=-2"}, "cannot be negative"),
        ({"--budget": "speedup=50"}, "8 removable units (4 attn, 4 act); ask for at most speedup="),
        ({"--budget": "units=2;speedup@8=1.5"}, "speed is known at batch 1, 64 only"),
        ({"--budget": "params=200K"}, "ask for at least params=401K"),
        ({"--budget": "macs=0.5", "costs.parquet": None}, "needs the costs of units"),
        ({"trials": None}, "no trial in 'run' has finished yet: run `dpt-search search`"),
        ({"ranking.json": None}, "no ranking in 'run' yet: run `dpt-search rank`"),
        ({"ranking.json": "{"}, "ranking.json is not readable JSON"),
        ({"costs.parquet": "PAR1"}, "costs.parquet"),
    ],
)
def test_a_budget_that_cannot_be_answered_is_one_line(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    write_run(tmp_path / "run", costs=True)
    budget = changes.pop("--budget", "units=2")
    for name, text in changes.items():
        path = tmp_path / "run" / name
        if text is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path.write_text(text)
    assert says in refused(tmp_path, "resolve", "run", "--budget", budget)


def test_until_a_stage_is_done_a_mistyped_model_may_be_put_right(tmp_path: Path) -> None:
    mistyped = replace(CONFIG, model=ModelSettings("vit_tny"), run_dir=str(tmp_path / "run"))
    right = replace(mistyped, model=CONFIG.model)
    open_run(mistyped, print)
    run = open_run(right, print)
    assert run.store.read_json("run.json")["config"]["model"]["name"] == "vit_tiny_patch16_224"
    run.stage("dense", {}, "dense/dense.json", lambda _: run.store.write_json("dense/dense.json", {}))
    with pytest.raises(BadConfig, match=r"^model\.name is 'vit_tny'"):
        open_run(mistyped, print)
    open_run(replace(right, max_trials=99), print)


def test_resolve_answers_without_and_with_measured_speed(tmp_path: Path) -> None:
    for costs in (False, True):
        write_run(tmp_path / "run", costs=costs)
        done = start("-m", "dpt_search", "resolve", "run", "--budget", "units=2,3", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        two, three = done.stdout.splitlines()[-2:]
        assert two.startswith("units=2 ") and three.startswith("units=3 ")
        assert ("x / " in two) is costs
        assert "observed" in two


def test_resolve_answers_budgets_of_every_kind_together(tmp_path: Path) -> None:
    write_run(tmp_path / "run", costs=True)
    budgets = "units=2 speedup=1.4 speedup@1=1.2 macs=0.8 params=500K"
    done = start("-m", "dpt_search", "resolve", "run", "--budget", budgets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "budget met" in done.stdout.splitlines()[0]
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[2:]}
    assert list(rows) == budgets.split()
    assert "as predicted" in rows["speedup=1.4"]
    # An attention saves a fifth of the time at batch 64, an activation a tenth; three tenths have to go.
    cell = re.search(r"\((\d),(\d)\)", rows["speedup=1.4"])
    assert cell is not None and (int(cell[1]), int(cell[2])) in ((0, 3), (1, 1), (2, 0))


def test_resolve_without_a_budget_answers_all_of_them(tmp_path: Path) -> None:
    write_run(tmp_path / "run", costs=True)
    done = start("-m", "dpt_search", "resolve", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("speedup at batch 64 ")
    with open(tmp_path / "run/pareto.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    gains, accuracies = ([float(row[name]) for row in rows] for name in ("gain", "accuracy"))
    assert gains == sorted(gains) and len(gains) > 3
    assert accuracies == sorted(accuracies, reverse=True)
    assert all(float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) for row in rows)
    assert [row["gain"] for row in rows] == [row["speedup_64"] for row in rows]
    assert (tmp_path / "run/plots/pareto.png").read_bytes().startswith(b"\x89PNG")
    done = start("-m", "dpt_search", "resolve", "run", "--against", "params", cwd=tmp_path)
    assert done.stdout.startswith("times fewer parameters ")
    assert "set accuracy against 'units'" in refused(tmp_path, "resolve", "run", "--against", "units")
    assert "speed is known at batch 1, 64 only" in refused(tmp_path, "resolve", "run", "--against", "speedup@2")


def test_resolve_says_where_speeds_are_of_compiled_models(tmp_path: Path) -> None:
    write_run(tmp_path / "run", costs=True, compiled=True)
    done = start("-m", "dpt_search", "resolve", "run", cwd=tmp_path)
    assert done.stdout.startswith("speedup at batch 64, compiled ")
    done = start("-m", "dpt_search", "resolve", "run", "--budget", "units=2", cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "speeds are those of compiled models"


def test_resolve_reads_only(tmp_path: Path) -> None:
    write_run(tmp_path / "run", costs=True)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert start("-m", "dpt_search", "resolve", "run", "--budget", "units=2", cwd=tmp_path).returncode == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_robustness_reads_the_trials_and_the_budgets_of_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    done = start("-m", "dpt_search", "robustness", "run", "--noise=0", "--draws=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run: 4 trials, 3 draws")
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("sd 0 points")]
    assert [(row[3], row[5], row[-2:]) for row in rows] == [
        ("units=2", "100.0%", ["0.000", "0.000"]), ("units=4", "100.0%", ["0.000", "0.000"])
    ]  # fmt: skip
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_robustness_of_a_run_without_trials_is_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/trials")
    assert "no trial in 'run' has finished yet" in refused(tmp_path, "robustness", "run")


def test_help_and_the_verbs_without_training_import_neither_torch_nor_ray(tmp_path: Path) -> None:
    write_run(tmp_path / "run", costs=True)
    quick = ["--help", "--version", *(f"{verb} --help" for verb in VERBS), "run --help-all"]
    study = ("robustness run --draws 2", "robustness run --preset hetdpt --draws 2", "robustness --preset hetdpt")
    done = start("-c", HEAVY, *quick, "resolve run --budget units=2", "resolve run", *study, "report run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/report.html").is_file()


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_readable_and_exits_with_zero(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    from dpt_search.cli import main

    try:
        code: Any = main([verb, "--help"] if verb else ["--help"])
    except SystemExit as left:
        code = left.code
    out = capsys.readouterr().out
    assert code == 0
    assert out.startswith(f"usage: dpt-search {verb or 'VERB'}")
    assert len(out.splitlines()) > 5
    for machinery in ("<class", "typing.", "<function", "factory>", "==SUPPRESS=="):
        assert machinery not in out
    for words in (
        []
        if verb not in DESCRIPTIONS or verb == "report"
        else ["--model.name", "--max-trials", "--budget", "--trial.lr"]
    ):
        assert words in out
    assert not verb or not [word for word in out.split() if word.startswith("--") and "_" in word.partition("=")[0]]


def test_the_overview_lists_every_verb_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    from dpt_search.cli import main

    assert main(["--help"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {words[0] for words in lines if len(words) == 2} >= set(VERBS)


def test_it_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    for package in ("dpt_search", "trainables", "search_spaces"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "embedded"))
    # Another version than the installed one tells which of the two ran.
    (tmp_path / "dpt_search/__init__.py").write_text('__version__ = "9.9.9"\n')
    done = start("-m", "dpt_search", "--version", cwd=tmp_path, root=None)
    assert (done.returncode, done.stdout) == (0, "dpt-search 9.9.9\n"), done.stderr
    write_run(tmp_path / "run")
    done = start("-m", "dpt_search", "resolve", "run", "--budget", "units=2", cwd=tmp_path, root=None)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["seed"] == 0
