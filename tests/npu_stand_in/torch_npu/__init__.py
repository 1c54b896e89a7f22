"""Stands in for Huawei's package of this name, so that all that runs on an NPU can be tested without one.

Its device is `device.cpp`, built beside this file as `_C`: memory of the host under the name of an NPU. Its collective
communication is gloo on copies. `tests/npu_stand_in/__init__.py` puts both together.
"""

import torch
import torch.distributed as dist
from torch.utils import rename_privateuse1_backend
from torch_npu import npu
from torch_npu.hccl import HostGroup

__version__ = f"{torch.__version__.split('+')[0]}.stand_in"

rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
dist.Backend.register_backend("hccl", HostGroup, devices=["npu"])


def _autoload() -> None:
    """Called by torch at its own import, as an entry point of `torch.backends` (the import did it all)."""
