"""A cluster that holds one worker at a time: probe and trials take turns."""

import subprocess
from pathlib import Path

import pytest
from driver import command
from head import ray_head

from dpt_search.run import Run
from dpt_search.store import RunStore, TrialLog

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_the_probe_goes_first_and_no_trial_is_proposed_before_it_is_known(tiny_run: Run) -> None:
    options = ("--max-trials", 3, "--max-concurrent", 2)
    with ray_head(cpus=1) as head:
        done = subprocess.run(
            command("search", tiny_run.store.location, *options),
            env={**head.env, "RAY_ADDRESS": head.address}, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the probe has all the room there is: trials begin after it") == 1
    run = Path(tiny_run.store.location)
    assert len(TrialLog(RunStore(str(run))).finished) == 3
    proposed = [each.stat().st_mtime_ns for each in (run / "trials").glob("*-proposed.json")]
    assert (run / "probe.parquet").stat().st_mtime_ns < min(proposed)
