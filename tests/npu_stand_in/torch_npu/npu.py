"""`torch.npu` of the stand-in: as many devices as ASCEND_RT_VISIBLE_DEVICES lists, one where it is not set."""

import os

import torch
from torch_npu import _C

_visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "0")
_C.set_device_count(len([device for device in _visible.split(",") if device]))
device_count, current_device = _C.device_count, _C.current_device
memory_allocated, max_memory_allocated = _C.memory_allocated, _C.max_memory_allocated


def is_available() -> bool:
    return device_count() > 0


def set_device(device: "torch.device | int | str") -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    _C.set_device(index or 0)


def synchronize(device: object = None) -> None:
    """Nothing is ever under way."""


def empty_cache() -> None:
    """Nothing is kept."""


def manual_seed_all(seed: int) -> None:
    """Random numbers are the CPU's, whose generator torch seeds itself."""


manual_seed = manual_seed_all


def get_device_name(device: object = None) -> str:
    return "Stand-in NPU"


def is_bf16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def _is_in_bad_fork() -> bool:
    return False
