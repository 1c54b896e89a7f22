"""Devices as a table of strings. A new accelerator is one row here and nothing elsewhere."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from search_spaces import BadInput

if TYPE_CHECKING:
    import torch

DeviceName = Literal["cpu", "cuda", "npu"]
"""The rows of `DEVICES`, as settings name them."""


class NoDevice(BadInput, RuntimeError):
    """This process cannot use a device; one on another node may, so a process is let go for it as for its errors."""


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: torch device type.
        resource: name of the Ray resource a worker asks for.
        extension: package that must be imported before torch knows the device; empty for torch's own.
        backend: collective communication backend.
        autocast: dtype name for mixed precision, where the hardware has it; empty where full precision is used.
        fused: whether torch's AdamW updates all parameters in one kernel there.
        float64: whether it multiplies matrices of float64.
        advice: what to do where the extension does not load, or finds no device.
    """

    name: str
    resource: str
    extension: str
    backend: str
    autocast: str
    fused: bool
    float64: bool
    advice: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether Ray calls it a GPU, for which some of its settings are."""
        return self.resource == "GPU"

    @property
    def dtype(self) -> str:
        """Name of the dtype that models are evaluated and timed in."""
        return self.autocast or "float32"

    @property
    def extension_version(self) -> str:
        """Version of the extension that is installed here; empty where it is not, or none is needed."""
        return _version(self.extension) if self.extension else ""


_ASCEND = "on a host with NPUs source set_env.sh of Ascend's CANN before Ray starts; elsewhere pip uninstall torch_npu"
DEVICES: dict[str, Device] = {
    "cpu": Device("cpu", "CPU", "", "gloo", "", fused=True, float64=True),
    "cuda": Device("cuda", "GPU", "", "nccl", "bfloat16", fused=True, float64=True),
    "npu": Device("npu", "NPU", "torch_npu", "hccl", "bfloat16", fused=False, float64=False, advice=_ASCEND),
}
RAY_ARGUMENTS = {"CPU": "num_cpus", "GPU": "num_gpus"}
"""Resources that Ray takes as arguments of their own; all others it takes by name."""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _torch_module(device: Device) -> Any:
    """Return `torch.cpu`, `torch.cuda` or `torch.npu`."""
    import torch

    if device.extension:
        importlib.import_module(device.extension)
    return getattr(torch, device.name)


def device_problem(name: str) -> str:
    """Say in one line why this process cannot use a device and what to do; empty where it can.

    What is looked at: that the device's extension is here and made for this torch, that both load and find a device,
    and that they bring the backend which workers communicate by.
    """
    device = DEVICES[name]
    mismatch = _mismatch(device)
    if mismatch:
        return mismatch
    try:
        module = _torch_module(device)
        import torch.distributed as dist
    except Exception as error:  # what extends torch fails in ways of its own
        return _does_not_load(device, error)
    if not module.is_available():
        hint = device.advice or "`dpt-search doctor` says what is"
        return f"device {name!r} is not available on this machine: {hint}"
    if not (dist.is_available() and dist.is_backend_available(device.backend)):
        brings = device.extension or "torch"
        return f"{brings} lacks the backend {device.backend!r} for device {name!r}: install a build that has it"
    return ""


def _mismatch(device: Device) -> str:
    """Say why a device's extension cannot be that of the torch which is here; nothing is imported."""
    if not device.extension:
        return ""
    torch_version, version = _version("torch"), device.extension_version
    release = ".".join(torch_version.split(".")[:2])
    if not version:
        return (
            f"device {device.name!r} needs {device.extension}, which is not installed on this machine: "
            f"`pip install '{device.extension}=={release}.*'`, to match torch {torch_version}"
        )
    if version.split(".")[:2] != release.split("."):
        return (
            f"{device.extension} {version} is not made for torch {torch_version}: install {device.extension} "
            f"{release}.*, or the torch that it is made for"
        )
    return ""


def _does_not_load(device: Device, error: BaseException) -> str:
    """Say why torch, or what extends it, cannot be imported: torch imports all that extends it, for any device."""
    named = [row for row in DEVICES.values() if row.extension and row.extension in str(error)]
    row = named[0] if named else device
    while error.__cause__ is not None:
        error = error.__cause__
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not row.extension:
        return f"torch does not load on this machine: {reason}"
    return (
        f"{row.extension} {row.extension_version} is installed on this machine but does not load ({reason}), and so "
        f"torch or Ray Train do not either: {row.advice}"
    )


def check_device(name: str) -> None:
    """Raise NoDevice with what `device_problem` tells, if it tells anything."""
    problem = device_problem(name)
    if problem:
        raise NoDevice(problem)


def torch_device(name: str) -> torch.device:
    """Return the torch device of this process: the current one, which is 0 unless `use_device` chose another.

    Raises:
        NoDevice: it cannot be used here, for the reason that `device_problem` tells.
    """
    check_device(name)
    import torch

    return torch.device(name) if name == "cpu" else torch.device(name, _torch_module(DEVICES[name]).current_device())


def use_device(device: torch.device) -> None:
    """Make a device the current one of its kind: Ray Train may show a worker more than its own."""
    if device.type != "cpu":
        _torch_module(DEVICES[device.type]).set_device(device)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    _torch_module(DEVICES[device.type]).synchronize()


def half_precision(device: torch.device) -> str:
    """Return the dtype name of mixed precision there: the row's, float16 where the hardware lacks it, or empty."""
    dtype, module = DEVICES[device.type].autocast, _torch_module(DEVICES[device.type])
    if dtype != "bfloat16" or device.type == "cpu":
        return dtype
    # CUDA says that it supports what it only emulates, unless asked.
    has_it = (
        module.is_bf16_supported(including_emulation=False) if device.type == "cuda" else module.is_bf16_supported()
    )
    return dtype if has_it else "float16"


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[Any]:
    """Return the mixed-precision context of the device; one that does nothing where full precision is used."""
    import torch

    dtype = half_precision(device) if enabled else ""
    return torch.autocast(device.type, dtype=getattr(torch, dtype)) if dtype else nullcontext()


def grad_scaler(device: torch.device, enabled: bool) -> torch.amp.GradScaler:
    """Return what keeps small gradients from vanishing in float16; it does nothing where that is not used."""
    import torch

    return torch.amp.GradScaler(device.type, enabled=enabled and half_precision(device) == "float16")


def describe(device: torch.device) -> str:
    """Return the hardware's name for reports."""
    import platform

    if device.type != "cpu":
        return str(_torch_module(DEVICES[device.type]).get_device_name(0))
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
