"""Devices as a table of strings. A new accelerator is one row here and nothing elsewhere."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: torch device type.
        resource: name of the Ray resource a worker asks for.
        extension: module that must be imported before torch knows the device; empty for torch's own.
        backend: collective communication backend.
        autocast: dtype name for mixed precision, where the hardware has it; empty where full precision is used.
        fused: whether torch's AdamW updates all parameters in one kernel there.
    """

    name: str
    resource: str
    extension: str
    backend: str
    autocast: str
    fused: bool


DEVICES = {
    "cpu": Device("cpu", "CPU", "", "gloo", "", fused=True),
    "cuda": Device("cuda", "GPU", "", "nccl", "bfloat16", fused=True),
    "npu": Device("npu", "NPU", "torch_npu", "hccl", "bfloat16", fused=False),
}


def _torch_module(device: Device) -> Any:
    """Return `torch.cpu`, `torch.cuda` or `torch.npu`."""
    import torch

    if device.extension:
        importlib.import_module(device.extension)
    return getattr(torch, device.name)


def torch_device(name: str) -> torch.device:
    """Return the torch device of this process: the current one, which is 0 unless `use_own_device` chose another.

    Raises:
        RuntimeError: the device is not available here.
    """
    import torch

    module = _torch_module(DEVICES[name])
    if not module.is_available():
        raise RuntimeError(f"device {name!r} is not available on this machine; `dpt-search doctor` says what is")
    return torch.device(name) if name == "cpu" else torch.device(name, module.current_device())


def use_own_device(name: str, local_rank: int) -> None:
    """Choose this worker's accelerator where Ray Train shows all of a node's to each of its workers."""
    module = _torch_module(DEVICES[name])
    if name != "cpu" and module.device_count() > 1:
        module.set_device(local_rank)


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
