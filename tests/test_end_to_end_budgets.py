"""A speed as the budget, on real Ray: it is met as measured, or refused before anything is trained."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from trainables.locations import resolve

EMBEDDED = Path(resolve("package:dpt_search/embedded/fashion_mnist")[1])
SIZES = {"train": 320, "probe": 50, "val": 100, "test": 100}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of a very short run on a few of the embedded images."""
    folder = tmp_path_factory.mktemp("quick")
    for split, size in SIZES.items():
        table = pq.read_table(EMBEDDED / f"{split}.parquet")
        labels = table["label"].to_numpy()
        chosen = np.concatenate([np.flatnonzero(labels == k)[: size // 10] for k in range(10)])
        pq.write_table(table.take(pa.array(np.sort(chosen))), folder / f"{split}.parquet")
    config = yaml.safe_load((EMBEDDED / "run.yaml").read_text())
    config["data"] |= {"path": str(folder), "subset": 160, "cache_dir": str(folder / "cache")}
    config |= {"max_trials": 2, "max_concurrent": 1, "timing_seconds": 2.0, "rank_batches": 1, "probe_epochs": 0}
    config |= {"finetune_workers": 1, "finetune_budget": "", "timing_batches": [64], "keep": "attn:0"}
    config["trial"] |= {"epochs": 1, "batch_size": 32}
    config["finetune"] |= {"epochs": 1, "batch_size": 32}
    del config["run_dir"]
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def dpt_search(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "dpt_search", *map(str, arguments)], capture_output=True, text=True)


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
