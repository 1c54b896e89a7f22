"""Runs that are killed, interrupted, or fail, on real Ray."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from driver import command, dpt_search, interrupted_when, killed_when, outcomes, wait_until, workers_of

from dpt_search.store import RunStore, TrialLog

pytestmark = pytest.mark.timeout(900)


def test_a_killed_fine_tune_goes_on_from_its_last_epoch(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    for name in ("finetune", "export"):
        shutil.rmtree(again / name)
    start = command("finetune", again)
    killed_when(start, lambda: (again / "finetune" / "progress.json").exists())
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search("going on after epoch [123]", done.stdout)

    def epochs(run: Path) -> list[tuple[float, float]]:
        found = json.loads((run / "finetune" / "finetune.json").read_text())
        return [(epoch["loss"], epoch["accuracy"]) for epoch in found["epochs"]]

    assert epochs(again) == epochs(finished)


def test_a_trial_whose_worker_is_killed_goes_on_from_its_last_epoch(finished, small, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("trials", "finetune", "export", "search.json"))
    driver = subprocess.Popen(command("search", run), stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_until(lambda: (run / "checkpoints" / "000001.pt").exists() and workers_of(driver.pid), driver)
        for worker in workers_of(driver.pid):
            os.kill(worker, signal.SIGKILL)
        printed, _ = driver.communicate(timeout=200)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    assert driver.returncode == 0, printed
    assert outcomes(run) == outcomes(finished)


def test_a_loss_that_is_not_finite_fails_every_trial_and_the_search_says_so(finished, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(finished, broken, ignore=shutil.ignore_patterns("trials", "finetune", "export"))
    recorded = json.loads((broken / "run.json").read_text())
    recorded["config"]["trial"]["lr"] = 1e30
    (broken / "run.json").write_text(json.dumps(recorded))
    done = dpt_search("search", broken, "--max-failures", 2)
    assert done.returncode == 1
    assert "2 trials in a row failed" in done.stderr
    assert "the loss became" in done.stderr
    log = TrialLog(RunStore(str(broken)))
    assert {record.status for record in log.finished.values()} == {"failed"}
    assert all(record.error for record in log.finished.values())


def test_ctrl_c_in_the_search_ends_the_run_there(finished, small, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("trials", "finetune", "export", "search.json"))
    driver = subprocess.Popen(command("run", "--run-dir", run), stderr=subprocess.PIPE, text=True)
    _, said = interrupted_when(lambda: (run / "trials" / "000001-proposed.json").exists(), driver)
    assert driver.returncode == 130, said
    assert "goes on from here" in said
    log = TrialLog(RunStore(str(run)))
    assert log.unfinished
    assert not (run / "stages" / "search.json").exists()
    assert not (run / "finetune").exists()
    assert not (run / "lease.json").exists()
