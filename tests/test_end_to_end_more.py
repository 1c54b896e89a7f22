"""Finished runs that are asked for more, on real Ray."""

import json
import shutil

import pytest
from driver import EMBEDDED, dpt_search, outcomes

from dpt_search.store import RunStore, TrialLog

pytestmark = pytest.mark.timeout(900)


def test_a_baseline_is_the_same_training_of_the_dense_model_and_the_export_says_so(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    done = dpt_search("export", again, "--baseline", "--export-formats", "safetensors")
    assert done.returncode == 2
    assert "run `dpt-search baseline` on it first" in done.stderr
    done = dpt_search("run", "--run-dir", again, "--baseline", "--export-formats", "safetensors")
    assert done.returncode == 0, done.stderr
    assert "finetune: already done" in done.stdout and "dense, same training" in done.stdout
    trained, merged = (json.loads((again / n / f"{n}.json").read_text()) for n in ("baseline", "finetune"))
    assert (trained["plan"], len(trained["epochs"])) == ("dense", len(merged["epochs"]))
    summary = json.loads((again / "export" / "summary.json").read_text())
    before, after = (
        place.read_bytes() for place in (EMBEDDED / "dense.safetensors", again / "baseline/model.safetensors")
    )
    assert len(after) > 2_000_000 and after != before
    lost = summary["merged"]["accuracy"] - summary["baseline"]["accuracy"]
    assert summary["baseline"]["difference"]["mean"] == pytest.approx(lost)
    assert not (again / "baseline" / "state.pt").exists()
    assert not (again / "export" / "model.onnx").exists()
    done = dpt_search("run", "--run-dir", again)
    assert "baseline: already done" in done.stdout and "export: already done" in done.stdout


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_another_sampler_goes_on_from_the_trials_there_are(finished, tmp_path, sampler):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("finetune", "export"))
    done = dpt_search("search", run, "--sampler", sampler, "--max-trials", 6)
    assert done.returncode == 0, done.stderr
    assert outcomes(run)[:4] == outcomes(finished)
    log = TrialLog(RunStore(str(run)))
    assert [log.proposed[n].sampler for n in sorted(log.proposed)] == ["map"] * 4 + [sampler] * 2
    assert all(log.finished[n].accuracy is not None for n in (4, 5))
