"""A speed as the budget, on real Ray: it is met as measured, or refused before anything is trained."""

import json
from pathlib import Path

import pytest
from driver import dpt_search, embedded_part

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of a very short run on a few of the embedded images."""
    return embedded_part(
        tmp_path_factory.mktemp("quick"), {"train": 320, "probe": 50, "val": 100, "test": 100}, data={"subset": 160},
        max_trials=2, max_concurrent=1, timing_seconds=2.0, rank_batches=1, probe_epochs=0, finetune_workers=1,
        finetune_budget="", timing_batches=[64], keep="attn:0", export_formats="safetensors",
        trial={"epochs": 1, "batch_size": 32}, finetune={"epochs": 1, "batch_size": 32},
    )  # fmt: skip


def test_a_speed_is_searched_for_measured_and_judged(quick: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = dpt_search("run", "--config", quick, "--run-dir", run, "--budget", "units=4 speedup=1.3")
    assert done.returncode == 0, done.stdout + done.stderr
    units, faster = json.loads((run / "recommendation.json").read_text())["budgets"]
    assert (units["budget"], faster["budget"]) == ("units=4", "speedup=1.3")
    assert faster["is_sure"]
    # Settled by the prediction, or else by the plan itself.
    assert (faster["predicted"] if faster["measured"] is None else faster["measured"]) >= 1.3
    assert faster["cell"] in faster["candidates"]
    assert 0 not in json.loads((run / "ranking.json").read_text())["attn"]
    summary = json.loads((run / "export" / "summary.json").read_text())
    assert summary["budget"] == "speedup=1.3"
    assert summary["verdict"]["met"] == (summary["timing"]["64"]["speedup"] >= 1.3)
    assert summary["verdict"]["text"] in done.stdout
    again = dpt_search("run", "--run-dir", run)
    assert again.returncode == 0, again.stderr
    assert "starting Ray" not in again.stdout


def test_a_speed_that_no_plan_has_is_refused_before_anything_is_trained(quick: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = dpt_search("run", "--config", quick, "--run-dir", run, "--budget", "speedup=50")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert "no plan meets budget speedup=50: the model has 23 removable units (11 attn, 12 act)" in done.stderr
    assert "ask for at most speedup=" in done.stderr
    assert not (run / "trials").exists() and not (run / "probe").exists()
    done = dpt_search("probe", run, "--budget", "speedup=50", "--probe-epochs", 1)
    assert done.returncode == 2, done.stdout + done.stderr
