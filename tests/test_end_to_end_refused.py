"""What a run refuses before anything is paid for, on real Ray."""

import pytest
from driver import dpt_search

pytestmark = pytest.mark.timeout(900)


def test_more_than_the_machine_holds_is_refused(small, tmp_path):
    done = dpt_search("run", "--config", small, "--run-dir", tmp_path / "run", "--cpus-per-trial", 4000)
    assert done.returncode == 2
    assert "cpus_per_trial" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_random_model_is_refused_before_anything_is_paid_for(small, tmp_path):
    done = dpt_search("run", "--config", small, "--run-dir", tmp_path / "run", "--model.checkpoint", "")
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
    done = dpt_search("run", "--config", small, "--run-dir", tmp_path / "run", *flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
