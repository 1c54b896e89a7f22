"""The program as a user runs it: real Ray, real images, real training, small numbers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dpt_search.store import RunStore, TrialLog
from trainables.locations import resolve

EMBEDDED = Path(resolve("package:dpt_search/embedded/fashion_mnist")[1])
SIZES = {"train": 640, "probe": 100, "val": 300, "test": 300}

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A folder with a small part of the embedded images and a configuration for it."""
    folder = tmp_path_factory.mktemp("small")
    for split, size in SIZES.items():
        table = pq.read_table(EMBEDDED / f"{split}.parquet")
        labels = table["label"].to_numpy()
        chosen = np.concatenate([np.flatnonzero(labels == k)[: size // 10] for k in range(10)])
        pq.write_table(table.take(pa.array(np.sort(chosen))), folder / f"{split}.parquet")
    config = yaml.safe_load((EMBEDDED / "run.yaml").read_text())
    config["data"] |= {"path": str(folder), "subset": 320, "cache_dir": str(folder / "cache")}
    config |= {"max_trials": 4, "max_concurrent": 1, "timing_seconds": 1.0, "rank_batches": 2, "probe_epochs": 1}
    config["trial"] |= {"epochs": 2, "batch_size": 32}
    config["finetune"] |= {"epochs": 4, "batch_size": 32}
    del config["run_dir"]
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dpt_search", *map(str, arguments)]


def dpt_search(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True)


def outcomes(run: Path) -> list[tuple[str, list[float]]]:
    log = TrialLog(RunStore(str(run)))
    return [(log.finished[n].plan, log.finished[n].accuracies) for n in sorted(log.finished)]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> tuple[Path, str]:
    """A finished run, and what it printed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    done = dpt_search("run", "--config", small / "run.yaml", "--run-dir", run)
    assert done.returncode == 0, done.stdout + done.stderr
    return run, done.stdout


class TestAFinishedRun:
    def test_says_what_came_out(self, finished):
        run, printed = finished
        for words in ("accuracy on test", "parameters", "speed at batch 64", "units=8", str(run / "report.html")):
            assert words in printed

    def test_left_everything_it_promised(self, finished):
        run, _ = finished
        for name in ("run.json", "costs.parquet", "ranking.json", "recommendation.json", "report.html"):
            assert (run / name).stat().st_size > 0
        for name in ("model.safetensors", "model.pt2", "model.onnx", "plan.json", "summary.json"):
            assert (run / "export" / name).stat().st_size > 0
        assert pq.read_metadata(run / "probe.parquet").num_rows == 33
        assert not (run / "probe" / "state.pt").exists()
        assert not (run / "lease.json").exists()
        assert not list((run / "checkpoints").iterdir())

    def test_logged_every_trial_before_it_ran(self, finished):
        log = TrialLog(RunStore(str(finished[0])))
        assert sorted(log.proposed) == sorted(log.finished) == [0, 1, 2, 3]
        for number, proposed in log.proposed.items():
            record = log.finished[number]
            assert proposed.plan == record.plan
            assert proposed.time < record.time
            assert proposed.seen == number
            assert len(record.accuracies) == 2
            assert record.cost > 0

    def test_merged_model_is_smaller_and_loads(self, finished):
        summary = json.loads((finished[0] / "export" / "summary.json").read_text())
        assert summary["merged"]["params"] < summary["dense"]["params"]
        assert summary["merged"]["macs"] < summary["dense"]["macs"]
        code = (
            "import dpt_search, torch\n"
            f"model = dpt_search.load_pruned({str(finished[0] / 'export')!r})\n"
            "assert not model.training\n"
            "print(tuple(model(torch.zeros(2, 1, 28, 28)).shape))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "(2, 10)", done.stderr

    def test_a_second_start_repeats_nothing(self, finished):
        run, _ = finished
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.suffix in (".safetensors", ".parquet")}
        records = sorted(p.name for p in (run / "trials").iterdir())
        done = dpt_search("run", "--run-dir", run)
        assert done.returncode == 0, done.stderr
        for stage in ("dense", "profile", "rank", "search", "recommend", "finetune", "export"):
            assert f"{stage}: already done" in done.stdout
        assert "starting Ray" not in done.stdout
        assert {p: p.stat().st_mtime_ns for p in before} == before
        assert sorted(p.name for p in (run / "trials").iterdir()) == records

    def test_resolve_answers_another_budget_at_once(self, finished):
        start = time.monotonic()
        done = dpt_search("resolve", finished[0], "--budget", "units=5,9")
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - start < 5
        assert re.search(r"units=5 +\(\d+,\d+\)", done.stdout)
        assert "units=9" in done.stdout

    def test_another_model_is_refused_naming_the_field(self, finished):
        done = dpt_search("run", "--run-dir", finished[0], "--model.name", "deit_tiny_patch16_224")
        assert done.returncode == 2
        assert "model.name" in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_same_serial_run_gives_the_same_trials_and_more_trials_go_on(finished, small, tmp_path):
    """The second run is killed twice on its way, in the middle of a trial and between two."""
    first, again = finished[0], tmp_path / "again"
    again.mkdir()
    (again / "costs.parquet").write_bytes((first / "costs.parquet").read_bytes())
    start = command("search", again, "--config", small / "run.yaml")
    for verb in ("dense", "profile", "rank"):
        done = dpt_search(verb, again, "--config", small / "run.yaml")
        assert done.returncode == 0, done.stderr
    killed_when(start, lambda: (again / "checkpoints" / "000000.pt").exists())
    assert not TrialLog(RunStore(str(again))).finished
    killed_when(start, lambda: len(TrialLog(RunStore(str(again))).finished) >= 2)
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcomes(again) == outcomes(first)
    assert dpt_search("search", again, "--max-trials", 5).returncode == 0
    assert outcomes(again)[:4] == outcomes(first)
    assert len(outcomes(again)) == 5
    done = dpt_search("recommend", again, "--budget", "units=3,8")
    assert done.returncode == 0, done.stderr
    found = json.loads((again / "recommendation.json").read_text())
    assert [row["budget"] for row in found["budgets"]] == ["units=3", "units=8"]


def killed_when(start: list[str], condition) -> None:
    """Start a driver, and kill -9 it, and all it started, once the condition holds."""
    driver = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until(condition, driver)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def wait_until(condition, driver: subprocess.Popen) -> None:
    for _ in range(2400):
        if condition():
            return
        assert driver.poll() is None, "the driver ended before the condition held"
        time.sleep(0.05)
    raise AssertionError("the condition never held")


def test_a_killed_fine_tune_goes_on_from_its_last_epoch(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished[0], again)
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

    assert epochs(again) == epochs(finished[0])


def test_a_baseline_is_the_same_training_of_the_dense_model_and_the_export_says_so(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished[0], again)
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


def test_a_trial_whose_worker_is_killed_goes_on_from_its_last_epoch(finished, small, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("trials", "finetune", "export", "search.json"))
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
    assert outcomes(run) == outcomes(finished[0])


def workers_of(session: int) -> list[int]:
    """Processes of a session that run trials."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, group = (folder / "cmdline").read_bytes(), os.getsid(int(folder.name))
        except (OSError, ProcessLookupError):
            continue
        if group == session and b"ray::" in name and b"Trainable" in name:
            found.append(int(folder.name))
    return found


def test_a_loss_that_is_not_finite_fails_every_trial_and_the_search_says_so(finished, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(finished[0], broken, ignore=shutil.ignore_patterns("trials", "finetune", "export"))
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
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("trials", "finetune", "export", "search.json"))
    driver = subprocess.Popen(command("run", "--run-dir", run), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: (run / "trials" / "000001-proposed.json").exists(), driver)
        driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=100)
    finally:
        driver.kill()
    assert driver.returncode == 130, said
    assert "goes on from here" in said
    log = TrialLog(RunStore(str(run)))
    assert log.unfinished
    assert not (run / "stages" / "search.json").exists()
    assert not (run / "finetune").exists()
    assert not (run / "lease.json").exists()


def test_more_than_the_machine_holds_is_refused(small, tmp_path):
    done = dpt_search("run", "--config", small / "run.yaml", "--run-dir", tmp_path / "run", "--cpus-per-trial", 4000)
    assert done.returncode == 2
    assert "cpus_per_trial" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_another_sampler_goes_on_from_the_trials_there_are(finished, tmp_path, sampler):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("finetune", "export"))
    done = dpt_search("search", run, "--sampler", sampler, "--max-trials", 6)
    assert done.returncode == 0, done.stderr
    assert outcomes(run)[:4] == outcomes(finished[0])
    log = TrialLog(RunStore(str(run)))
    assert [log.proposed[n].sampler for n in sorted(log.proposed)] == ["map"] * 4 + [sampler] * 2
    assert all(log.finished[n].accuracy is not None for n in (4, 5))


def test_a_random_model_is_refused_before_anything_is_paid_for(small, tmp_path):
    done = dpt_search("run", "--config", small / "run.yaml", "--run-dir", tmp_path / "run", "--model.checkpoint", "")
    assert done.returncode == 2
    assert "chance" in done.stderr
    assert not (tmp_path / "run" / "trials").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.name", "vit_nonsense"], "vit_nonsense"),
        (["--data.path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--budget", "units=400", "--finetune-budget", ""], "at most units=24"),
    ],
)
def test_what_only_a_worker_can_see_is_one_line_too(small, tmp_path, flags, words):
    done = dpt_search("run", "--config", small / "run.yaml", "--run-dir", tmp_path / "run", *flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
