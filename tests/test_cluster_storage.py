"""A whole run on an object store: a real S3 server on this machine, and a driver that is killed twice."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from driver import command, killed_when, outcomes
from s3 import s3_server, variables

from dpt_search.store import RunStore, TrialLog

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
DONE_BEFORE = ("dense/dense.json", "costs.parquet", "ranking.json", "probe.parquet", "probe/model.safetensors")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket, for this process and those it starts."""
    with s3_server("bucket") as env, variables(env):
        yield "s3://bucket"


def uploaded(finished: Path, location: str) -> RunStore:
    """Copy a finished run as it was before its search."""
    store = RunStore(location)
    stages = [f"stages/{name}.json" for name in ("dense", "profile", "rank", "probe")]
    for name in (*DONE_BEFORE, *(name for name in stages if (finished / name).exists())):
        store.write(name, (finished / name).read_bytes())
    return store


def test_a_run_on_s3_that_is_killed_goes_on_and_ends_as_one_on_disk_does(bucket, finished, small):
    store = uploaded(finished, f"{bucket}/runs/one")
    start = command("run", "--config", small, "--run-dir", store.location)
    killed_when(start, lambda: store.exists("checkpoints/000001.pt"))
    assert set(TrialLog(store).finished) == {0}
    killed_when(start, lambda: store.exists("finetune/progress.json"))
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(store.location) == outcomes(finished)
    names = store.names("trials")
    assert [sum(part in name for name in names) for part in ("-proposed", "-finished-")] == [4, 4]
    for name in ("report.html", "export/model.safetensors", "export/model.pt2", "finetune/model.safetensors"):
        assert store.exists(name)
    assert not store.exists("lease.json")
    again = subprocess.run(start, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "starting Ray" not in again.stdout


def test_a_run_on_s3_is_resolved_and_its_model_loaded_from_there(bucket, finished):
    store = RunStore(f"{bucket}/runs/two")
    for path in finished.rglob("*"):
        if path.is_file():
            store.write(str(path.relative_to(finished)), path.read_bytes())
    done = subprocess.run(command("resolve", store.location, "--budget", "units=5"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "units=5" in done.stdout
    import dpt_search

    assert not dpt_search.load_pruned(store.path("export")).training


def test_a_bucket_that_is_not_there_is_one_line(bucket, small):
    done = subprocess.run(
        command("run", "--config", small, "--run-dir", "s3://no-such-bucket/run"), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "run directory 's3://no-such-bucket/run'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_server_that_does_not_answer_is_one_line(bucket, small):
    env = {**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    start = command("run", "--config", small, "--run-dir", f"{bucket}/run")
    done = subprocess.run(start, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert f"cannot read from the run directory '{bucket}/run'" in done.stderr
    assert done.stderr.count("\n") == 1
