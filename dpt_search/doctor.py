"""What this machine and a model can do, checked one by one in fresh processes, so that a broken part breaks nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpt_search.remote import StageFailed, call_here
from dpt_search.run import versions
from trainables.devices import DEVICES, Device
from trainables.settings import ModelSettings

_CHECKS = {
    "torch": "import torch; print(torch.__version__, f'with {torch.get_num_threads()} threads')",
    "timm": (
        "from search_spaces.timm_compat import timm; print(timm.__version__, f'with {len(timm.list_models())} models')"
    ),
    "ray": "import ray; print(ray.__version__)",
}
_DEVICE = """
import sys
from trainables.devices import describe, device_problem, torch_device
problem = device_problem({name!r})
if problem:
    sys.exit(problem)
print(describe(torch_device({name!r})))
"""


def examine(model: ModelSettings) -> Iterator[tuple[str, bool]]:
    """Yield one finding after another, each with whether it is as it should be.

    Where torch does not load, no more is said than why: everything else would fail for the same reason.

    Args:
        model: a model to look at; without a name none.

    Raises:
        BadInput: timm does not know the model's name or an argument; before the first finding.
    """
    cpu = _line("device cpu", _DEVICE.format(name="cpu"))
    about_model = list(_model_lines(model)) if model.name and cpu[1] else []
    found = versions()
    yield ", ".join(f"{name} {version}" for name, version in found.items()), True
    yield f"{os.cpu_count()} CPU cores, {shutil.disk_usage('.').free / 2**30:.0f} GiB of disk free here", True
    for name, code in _CHECKS.items() if cpu[1] else [("ray", _CHECKS["ray"])]:
        yield _line(name, code)
    yield cpu if cpu[1] else (cpu[0].replace("device cpu", "torch", 1), False)
    for name in [name for name in DEVICES if name != "cpu" and cpu[1]]:
        yield _accelerator(DEVICES[name])
    yield from about_model


def _accelerator(device: Device) -> tuple[str, bool]:
    """Return what there is of an accelerator. None is as it should be, unless something for it is installed here."""
    text, ok = _line(f"device {device.name}", _DEVICE.format(name=device.name))
    if not ok and not device.extension_version:
        return f"device {device.name}: none on this machine", True
    return text, ok


def _model_lines(model: ModelSettings) -> Iterator[tuple[str, bool]]:
    """Yield what a model is, how many units of each kind it has, and every reason why others are none."""
    try:
        found = call_here("trainables.offers:describe_offer", model)
    except StageFailed as error:
        yield f"model {model.name}: {str(error).strip().splitlines()[-1]}", False
        return
    yield f"model {model.name}: {found['about']}", True
    if found["no_family"]:
        yield f"nothing can be removed: {found['no_family']}", False
        return
    yield from offer_lines(found)


def offer_lines(found: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield a line per kind of unit, and one per reason; what `trainables.offers.describe_offer` found is laid out.

    A kind of which nothing can be removed is as it should be while there are units of the other.
    """
    refused: list[str] = [unit for units in found["refused"].values() for unit in units]
    for kind, units in found["units"].items():
        of = len(units) + sum(unit.startswith(f"{kind}:") for unit in refused)
        yield f"{kind}: {len(units)} of {of} can be removed", bool(units) or any(found["units"].values())
    for reason, units in found["refused"].items():
        yield f"not {' '.join(spans(units))}: {reason}", True


def spans(units: list[str]) -> list[str]:
    """Write units shortly, by kind: `act:0 act:1 act:2 act:5` is `act:0-2,5`."""
    numbers: dict[str, list[int]] = {}
    for unit in units:
        kind, _, index = unit.partition(":")
        numbers.setdefault(kind, []).append(int(index))
    return [f"{kind}:{_runs(sorted(indices))}" for kind, indices in numbers.items()]


def _runs(indices: list[int]) -> str:
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _line(what: str, code: str) -> tuple[str, bool]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), *sys.path]))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return f"{what}: {done.stdout.strip()}", True
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"{what}: {reason}", False
