"""Removing and merging hold no second copy of the model."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks/surgery_memory.py"


def test_the_surgery_adds_little_to_the_peak_of_memory():
    command = [sys.executable, str(SCRIPT), "--model", "vit_small_patch16_224"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SCRIPT.parents[1])
    found = json.loads(done.stdout)
    assert found["weights_mib"] > 80
    assert found["added_mib"] < found["weights_mib"] / 2
