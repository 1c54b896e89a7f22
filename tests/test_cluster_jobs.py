"""The program as a job on a real head of Ray's: results, exit codes, the log, Ctrl-C, and a driver that is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from driver import dpt_search, interrupted_when, outcomes, wait_until
from head import BIN, ROOT, Head, ray_head

from dpt_search.store import RunStore, TrialLog

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as started:
        yield started


@pytest.fixture
def ranked(finished: Path, tmp_path: Path) -> Path:
    """The finished run as it was before its search."""
    left = ("trials", "finetune", "export", "search.json", "recommend.json", "recommendation.json", "report.html")
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns(*left))


def submit_command(head: Head, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "dpt_search", "submit", "--address", head.url, *map(str, arguments)]


def submitted(head: Head, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(submit_command(head, *arguments), env=head.env, capture_output=True, text=True)


def job_of(said: str) -> str:
    found = re.search(r"submitted (\w+);", said)
    assert found, said
    return found[1]


def same_result(run: Path, finished: Path) -> bool:
    def read(place: Path) -> tuple[list[object], list[float]]:
        rows = json.loads((place / "recommendation.json").read_text())["budgets"]
        epochs = json.loads((place / "finetune" / "finetune.json").read_text())["epochs"]
        return [(row["budget"], row["plan"], row["mean"]) for row in rows], [epoch["loss"] for epoch in epochs]

    return outcomes(run) == outcomes(finished) and read(run) == read(finished)


def job_from_checkout(head: Head, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [BIN / "ray", "job", "submit", "--address", head.url, "--working-dir", ROOT, "--"]
    return subprocess.run(
        [*command, "python", "-m", "dpt_search", *map(str, arguments)], env=head.env, capture_output=True, text=True
    )


def test_a_job_from_a_checkout_gives_what_a_direct_run_does(head, ranked, finished):
    done = job_from_checkout(head, "run", "--run-dir", ranked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_result(ranked, finished)


@pytest.mark.timeout(1800)
def test_the_embedded_example_as_a_job_gives_what_it_gives_directly(head, tmp_path):
    # One trial at a time: which of two ends first is chance, and the searcher's next proposal depends on it.
    one_by_one = ("run", "--max-concurrent", 1, "--run-dir")
    directly = dpt_search(*one_by_one, tmp_path / "directly")
    assert directly.returncode == 0, directly.stdout + directly.stderr
    as_a_job = job_from_checkout(head, *one_by_one, tmp_path / "job")
    assert as_a_job.returncode == 0, as_a_job.stdout + as_a_job.stderr
    assert same_result(tmp_path / "job", tmp_path / "directly")


def test_a_submitted_job_gives_what_a_direct_run_does_with_a_line_for_every_trial(head, ranked, finished, small):
    done = submitted(head, "run", "--config", small, "--run-dir", ranked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert same_result(ranked, finished)
    # Between Ray's own two lines and the table at the end, every line is one of the run's.
    log = done.stdout.partition("\n\n")[0].splitlines()
    assert log[0].startswith("submitted ")
    assert [line for line in log[3:] if not re.match(r"\d\d:\d\d:\d\d  \S", line)] == []
    assert [sum(f"trial {number} (" in line for line in log) for number in range(4)] == [1, 1, 1, 1]


def test_what_a_user_got_wrong_ends_with_2(head, small, tmp_path):
    done = submitted(head, "run", "--config", small, "--run-dir", tmp_path / "run", "--model.name", "vit_nonsense")
    assert done.returncode == 2
    assert "dpt-search: timm has no model 'vit_nonsense'" in done.stdout


def test_a_run_directory_that_would_go_with_the_job_ends_with_2(head, small):
    done = submitted(head, "run", "--config", small)
    assert done.returncode == 2
    assert "dpt-search: run_dir 'runs/default' is relative" in done.stdout


def test_a_failure_ends_with_1(head, ranked):
    recorded = json.loads((ranked / "run.json").read_text())
    recorded["config"]["trial"]["lr"] = 1e30
    (ranked / "run.json").write_text(json.dumps(recorded))
    done = submitted(head, "search", ranked, "--max-failures", 2)
    assert done.returncode == 1
    assert "dpt-search: 2 trials in a row failed" in done.stdout


def test_a_driver_that_was_killed_and_submitted_again_goes_on_with_no_trial_lost_or_doubled(head, ranked, finished):
    done = submitted(head, "--no-wait", "search", ranked)
    assert done.returncode == 0, done.stderr
    following = subprocess.Popen(submit_command(head, "--follow", job_of(done.stdout)), env=head.env)
    try:
        wait_until(lambda: (ranked / "checkpoints" / "000001.pt").exists(), following)
        os.kill(json.loads((ranked / "lease.json").read_text())["pid"], signal.SIGKILL)
        assert following.wait(60) == 128 + signal.SIGKILL
    finally:
        following.kill()
    assert set(TrialLog(RunStore(str(ranked))).finished) == {0}
    again = submitted(head, "search", ranked)
    assert again.returncode == 0, again.stdout
    assert outcomes(ranked) == outcomes(finished)
    assert len(list((ranked / "trials").glob("*-proposed.json"))) == 4
    assert len(list((ranked / "trials").glob("*-finished-*.json"))) == 4


def test_ctrl_c_stops_the_job_and_the_same_command_goes_on(head, ranked, finished):
    start = submit_command(head, "search", ranked)
    following = subprocess.Popen(start, env=head.env, stdout=subprocess.PIPE, text=True)
    said, _ = interrupted_when(lambda: (ranked / "trials" / "000001-proposed.json").exists(), following)
    assert following.returncode == 130
    assert said.endswith("the job was stopped; the same command goes on from here\n")
    assert "interrupted; the same command goes on from here" in said
    assert TrialLog(RunStore(str(ranked))).unfinished
    assert not (ranked / "lease.json").exists()
    # Another who looks at the job that was stopped is told the same.
    later = submitted(head, "--follow", job_of(said))
    assert later.returncode == 130
    assert later.stdout in said.replace("\nstopping the job\n", "")
    assert submitted(head, "search", ranked).returncode == 0
    assert outcomes(ranked) == outcomes(finished)


def test_ctrl_c_leaves_a_job_alone_that_is_only_watched(head, ranked):
    job = job_of(submitted(head, "--no-wait", "search", ranked).stdout)
    watching = subprocess.Popen(submit_command(head, "--follow", job), env=head.env, stdout=subprocess.PIPE, text=True)
    said, _ = interrupted_when(lambda: (ranked / "trials" / "000000-proposed.json").exists(), watching)
    assert watching.returncode == 130
    assert "the job goes on" in said
    done = submitted(head, "--follow", job)
    assert done.returncode == 0
    assert "trial 3 (" in done.stdout


def test_a_job_that_is_not_there_is_one_line(head):
    done = submitted(head, "--follow", "no_such_job")
    assert done.returncode == 2
    assert done.stderr == "dpt-search: the cluster has no job 'no_such_job': `ray job list` names those it has\n"


def test_a_stopped_job_gives_the_run_up_before_ray_kills_it(head, ranked):
    """As `ray job submit` starts it: with Ray's own three seconds."""
    command = [BIN / "ray", "job", "submit", "--address", head.url, "--no-wait", "--submission-id", "stopped"]
    work = ["--working-dir", ROOT, "--", "python", "-m", "dpt_search", "search", ranked]
    subprocess.run([*command, *work], env=head.env, capture_output=True, check=True)
    watching = subprocess.Popen(submit_command(head, "--follow", "stopped"), env=head.env, stdout=subprocess.PIPE)
    try:
        wait_until(lambda: (ranked / "trials" / "000001-proposed.json").exists(), watching)
        assert (ranked / "lease.json").exists()
        stop = [BIN / "ray", "job", "stop", "--address", head.url, "stopped"]
        subprocess.run(stop, env=head.env, capture_output=True, check=True)
        said, _ = watching.communicate(timeout=60)
    finally:
        watching.kill()
    assert watching.returncode == 130
    assert b"interrupted; the same command goes on from here" in said
    assert not (ranked / "lease.json").exists()
