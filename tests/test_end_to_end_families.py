"""The whole program on models of other families: stages of differing width, gates that are absorbed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import write_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SWIN = {
    "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2],
    "in_chans": 1, "num_classes": 3,
}  # fmt: skip
SWIGLU = {
    "img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 4, "num_heads": 2, "in_chans": 1, "num_classes": 3,
}  # fmt: skip


def run(folder: Path, name: str, kwargs: dict, *more: str) -> tuple[Path, str]:
    for seed, (split, count) in enumerate({"train": 192, "probe": 24, "val": 48, "test": 60}.items()):
        write_table(folder / f"data/{split}.parquet", count, seed=seed)
    told = {
        "model.name": name, "model.kwargs": json.dumps(kwargs), "data.path": str(folder / "data"), "data.subset": "96",
        "data.mean": "[0.4]", "data.std": "[0.25]", "data.crop_pct": "1.0", "data.cache_dir": str(folder / "cache"),
        "adapt.epochs": "6", "adapt.batch_size": "32", "adapt.lr": "0.05", "trial.epochs": "1",
        "trial.batch_size": "32",
        "trial.lr": "0.02", "finetune.epochs": "2", "finetune.batch_size": "32", "max_trials": "3", "probe_epochs": "1",
        "probe_cells": "3", "rank_batches": "1", "timing_seconds": "0.5", "timing_batches": "[1]",
        "budget": "units=2,4",
        "max_concurrent": "1", "run_dir": str(folder / "run"),
    }  # fmt: skip
    command = [sys.executable, "-m", "dpt_search", "run", *(f"--{key}={value}" for key, value in told.items()), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout


def exports_agree(folder: Path) -> None:
    summary = json.loads((folder / "export/summary.json").read_text())
    assert summary["merged"]["params"] < summary["dense"]["params"]
    assert summary["merged"]["macs"] < summary["dense"]["macs"]
    differences = [each["largest_logit_difference"] for each in summary["formats"].values()]
    assert len(differences) == 3
    assert max(differences) <= 1e-3


def test_stages_of_differing_width_go_through_the_whole_run(tmp_path):
    folder, printed = run(tmp_path, "swin_tiny_patch4_window7_224", SWIN)
    assert "accuracy on test" in printed
    costs = pq.read_table(folder / "costs.parquet").to_pylist()
    units = [row for row in costs if row["kind"] != "dense"]
    assert len(units) == 8
    assert len({row["params"] for row in units if row["kind"] == "act"}) == 2
    exports_agree(folder)


def test_a_gated_model_says_so_and_goes_through_with_its_gates_absorbed(tmp_path):
    folder, printed = run(tmp_path / "kept", "vit_giant_patch14_dinov2", SWIGLU, "--finetune_budget=units=2")
    assert "--gated absorb" in printed
    assert json.loads((folder / "dense/dense.json").read_text())["units"]["act"] == []
    folder, printed = run(tmp_path / "absorbed", "vit_giant_patch14_dinov2", SWIGLU, "--gated=absorb")
    told = json.loads((folder / "dense/dense.json").read_text())
    assert told["units"] == {"attn": [0, 1, 2, 3], "act": [0, 1, 2, 3]}
    assert all(0 < np.float64(error) < 1 for error in told["absorbed"].values())
    exports_agree(folder)
