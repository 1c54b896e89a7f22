"""The program as a user runs it: real Ray, real images, real training, small numbers."""

import json
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from driver import command, dpt_search, killed_when, outcomes

from dpt_search.store import RunStore, TrialLog

pytestmark = pytest.mark.timeout(900)


class TestAFinishedRun:
    def test_says_what_came_out(self, finished):
        printed = (finished.parent / "printed.txt").read_text()
        for words in ("accuracy on test", "parameters", "speed at batch 64", "units=8", str(finished / "report.html")):
            assert words in printed

    def test_left_everything_it_promised(self, finished):
        for name in ("run.json", "costs.parquet", "ranking.json", "recommendation.json", "report.html"):
            assert (finished / name).stat().st_size > 0
        for name in ("model.safetensors", "model.pt2", "model.onnx", "plan.json", "summary.json"):
            assert (finished / "export" / name).stat().st_size > 0
        assert pq.read_metadata(finished / "probe.parquet").num_rows == 16
        assert not (finished / "probe" / "state.pt").exists()
        assert not (finished / "lease.json").exists()
        assert not list((finished / "checkpoints").iterdir())

    def test_logged_every_trial_before_it_ran(self, finished):
        log = TrialLog(RunStore(str(finished)))
        assert sorted(log.proposed) == sorted(log.finished) == [0, 1, 2, 3]
        for number, proposed in log.proposed.items():
            record = log.finished[number]
            assert proposed.plan == record.plan
            assert proposed.time < record.time
            assert proposed.seen == number
            assert len(record.accuracies) == 2
            assert record.cost > 0

    def test_merged_model_is_smaller_and_loads(self, finished):
        summary = json.loads((finished / "export" / "summary.json").read_text())
        assert summary["merged"]["params"] < summary["dense"]["params"]
        assert summary["merged"]["macs"] < summary["dense"]["macs"]
        code = (
            "import dpt_search, torch\n"
            f"model = dpt_search.load_pruned({str(finished / 'export')!r})\n"
            "assert not model.training\n"
            "print(tuple(model(torch.zeros(2, 1, 28, 28)).shape))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "(2, 10)", done.stderr

    def test_a_second_start_repeats_nothing(self, finished, tmp_path):
        again = shutil.copytree(finished, tmp_path / "again")
        before = {p: p.stat().st_mtime_ns for p in again.rglob("*") if p.suffix in (".safetensors", ".parquet")}
        records = sorted(p.name for p in (again / "trials").iterdir())
        done = dpt_search("run", "--run-dir", again)
        assert done.returncode == 0, done.stderr
        for stage in ("dense", "profile", "rank", "search", "recommend", "finetune", "export"):
            assert f"{stage}: already done" in done.stdout
        assert "starting Ray" not in done.stdout
        assert {p: p.stat().st_mtime_ns for p in before} == before
        assert sorted(p.name for p in (again / "trials").iterdir()) == records

    def test_resolve_answers_another_budget_without_ray(self, finished):
        done = dpt_search("resolve", finished, "--budget", "units=5,9")
        assert done.returncode == 0, done.stderr
        assert "starting Ray" not in done.stdout
        assert re.search(r"units=5 +\(\d+,\d+\)", done.stdout)
        assert "units=9" in done.stdout

    def test_another_model_is_refused_naming_the_field(self, finished):
        done = dpt_search("run", "--run-dir", finished, "--model.name", "deit_tiny_patch16_224")
        assert done.returncode == 2
        assert "model.name" in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_same_serial_run_gives_the_same_trials_and_more_trials_go_on(finished, small, tmp_path):
    """The second run is killed twice on its way, in the middle of a trial and between two."""
    again = tmp_path / "again"
    for name in ("dense/dense.json", "costs.parquet", "stages/dense.json", "stages/profile.json"):
        (again / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished / name, again / name)
    done = dpt_search("rank", again, "--config", small)
    assert done.returncode == 0, done.stderr
    start = command("search", again, "--config", small)
    killed_when(start, lambda: (again / "checkpoints" / "000000.pt").exists())
    assert not TrialLog(RunStore(str(again))).finished
    killed_when(start, lambda: len(TrialLog(RunStore(str(again))).finished) >= 2)
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcomes(again) == outcomes(finished)
    assert dpt_search("search", again, "--max-trials", 5).returncode == 0
    assert outcomes(again)[:4] == outcomes(finished)
    assert len(outcomes(again)) == 5
    done = dpt_search("recommend", again, "--budget", "units=3,8")
    assert done.returncode == 0, done.stderr
    found = json.loads((again / "recommendation.json").read_text())
    assert [row["budget"] for row in found["budgets"]] == ["units=3", "units=8"]
