"""The backend "hccl" of the stand-in: gloo on copies in the host's memory, done when it is asked for."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future


def _done(result: object) -> dist.Work:
    future: torch.futures.Future[object] = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)


class HostGroup(dist.ProcessGroup):
    """A process group for tensors on the stand-in."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "hccl"

    def allreduce(self, tensors: list[torch.Tensor], options: object = None) -> dist.Work:
        return self._on_copies(tensors, lambda copies: self._gloo.allreduce(copies, options))

    def broadcast(self, tensors: list[torch.Tensor], options: object = None) -> dist.Work:
        return self._on_copies(tensors, lambda copies: self._gloo.broadcast(copies, options))

    def allgather(
        self, outputs: list[list[torch.Tensor]], tensors: list[torch.Tensor], options: object = None
    ) -> dist.Work:
        copies = [[_copy(tensor) for tensor in output] for output in outputs]
        self._gloo.allgather(copies, [_copy(tensor) for tensor in tensors]).wait()
        for output, copied in zip(outputs, copies, strict=True):
            _write(output, copied)
        return _done(outputs)

    def barrier(self, options: object = None) -> dist.Work:
        self._gloo.barrier().wait()
        return _done([])

    def _on_copies(self, tensors, collective) -> dist.Work:
        for tensor in tensors:
            if tensor.device.type != "npu":
                raise RuntimeError(f"hccl is for tensors on an NPU, not on {tensor.device.type}")
        copies = [_copy(tensor) for tensor in tensors]
        collective(copies).wait()
        _write(tensors, copies)
        return _done(tensors)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(tensors: list[torch.Tensor], copies: list[torch.Tensor]) -> None:
    for tensor, copied in zip(tensors, copies, strict=True):
        tensor.copy_(copied)
