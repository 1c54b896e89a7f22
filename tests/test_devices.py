"""Why a device cannot be used, in one line, and what `doctor` says of a host that lacks something."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import npu_stand_in
import pytest

from search_spaces import BadInput
from trainables.devices import DEVICES, DeviceName, check_device, device_problem, torch_device

ROOT = Path(__file__).parents[1]
WITHOUT_BACKEND = """
import sys, types
import torch
torch.npu = types.SimpleNamespace(is_available=lambda: True)
def _autoload(): pass
"""
WITHOUT_CARDS = WITHOUT_BACKEND.replace("True", "False")
NO_DRIVER = (
    f"torch_npu {npu_stand_in.TORCH} is installed on this machine but does not load "
    f"({npu_stand_in.MISSING_SHARED_LIBRARY}), and so torch or Ray Train do not either: on a host with NPUs source "
    "set_env.sh of Ascend's CANN before Ray starts; elsewhere pip uninstall torch_npu"
)


def python(host: Path, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run Python with what is in a folder installed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(host), str(ROOT))), **more}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)


def problem_on(host: Path, name: str) -> str:
    done = python(host, "-c", f"from trainables.devices import device_problem; print(device_problem({name!r}))")
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


def test_settings_name_the_rows_of_the_table() -> None:
    assert list(get_args(DeviceName)) == list(DEVICES) == [row.name for row in DEVICES.values()]


def test_a_cpu_has_no_problem() -> None:
    assert device_problem("cpu") == ""
    check_device("cpu")
    assert torch_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", [name for name in ("cuda", "npu") if device_problem(name)])
def test_a_device_that_is_not_here_is_refused_with_what_is_wrong(name) -> None:
    problem = device_problem(name)
    assert f"device {name!r}" in problem
    for use in (check_device, torch_device):
        with pytest.raises(BadInput) as raised:
            use(name)
        assert str(raised.value) == problem


@pytest.mark.parametrize("name", ["cpu", "npu"])
def test_a_host_without_the_driver_is_told_so_for_every_device(tmp_path, name) -> None:
    """Torch itself does not load there, because it imports all that extends it."""
    host = npu_stand_in.install_without_driver(tmp_path / "host")
    assert "Failed to load the backend extension: torch_npu" in python(host, "-c", "import torch").stderr
    assert problem_on(host, name) == NO_DRIVER


def test_an_extension_for_another_torch_is_told_before_it_is_imported(tmp_path) -> None:
    host = npu_stand_in.install_broken(tmp_path / "host", "raise SystemExit('it was imported')", version="2.1.0")
    assert problem_on(host, "npu").startswith("torch_npu 2.1.0 is not made for torch ")


@pytest.mark.parametrize(
    ("code", "words"),
    [(WITHOUT_BACKEND, "torch_npu lacks the backend 'hccl'"), (WITHOUT_CARDS, "device 'npu' is not available")],
)
def test_backend_and_device_have_to_be_there(tmp_path, code, words) -> None:
    assert words in problem_on(npu_stand_in.install_broken(tmp_path / "host", code), "npu")


def doctor_on(host: Path, **more: str) -> list[str]:
    done = python(host, "-m", "dpt_search", "doctor", **more)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if not line.startswith("ok ")]


@pytest.mark.timeout(120)
def test_doctor_says_once_why_torch_does_not_load(tmp_path) -> None:
    host = npu_stand_in.install_without_driver(tmp_path / "host")
    assert doctor_on(host) == [f"NO   torch: {NO_DRIVER}"]


@pytest.mark.timeout(120)
def test_doctor_says_so_too_where_torch_is_told_not_to_load_it(tmp_path) -> None:
    """Torch loads there, but Ray Train imports the extension wherever it is installed."""
    host = npu_stand_in.install_without_driver(tmp_path / "host")
    variable = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    train = python(host, "-c", "import torch; print('torch'); import ray.train.torch", **variable)
    assert (train.stdout, train.returncode) == ("torch\n", 1)
    assert npu_stand_in.MISSING_SHARED_LIBRARY in train.stderr
    assert doctor_on(host, **variable) == [f"NO   device npu: {NO_DRIVER}"]
