"""Bad input that only a worker can see is one line too, and costs no more than the start of Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(120)
def test_an_unknown_model_is_one_line_with_others_like_it(tmp_path: Path) -> None:
    argv = ["run", "--run-dir=run", "--model.name=vit_tiny_patch16_225", "--data.path=package:dpt_search/embedded"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "dpt_search", *argv], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("dpt-search:")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert "timm has no model 'vit_tiny_patch16_225'" in lines[0]
    assert "; similar: " in lines[0]
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json"]
