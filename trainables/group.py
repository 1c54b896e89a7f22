"""The workers that train one model together, and what they do together; a single one does it alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn.parallel import DistributedDataParallel

from trainables.batches import Share


@dataclass(frozen=True)
class Group:
    """A worker's place in its group; a group of several needs torch's default process group.

    Attributes:
        rank: this worker's number, from 0.
        world: number of workers.
        most: the most workers that the group may have at other times.
    """

    rank: int = 0
    world: int = 1
    most: int = 1

    @property
    def share(self) -> Share:
        """What this worker takes of every batch."""
        return Share(self.rank, self.world)

    def distributed(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the form of the model whose gradients are averaged over all workers."""
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        ids = None if device.type == "cpu" else [device]
        # A removed attention may leave weights that nothing uses, such as a bias that blocks shared: always the same.
        return DistributedDataParallel(model, device_ids=ids, static_graph=True)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all workers."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, own: bool, device: torch.device) -> bool:
        """Say whether any worker says so; `device` is what they communicate on."""
        return bool(self.sum(torch.tensor([own], dtype=torch.float32, device=device)).item())

    def keeping_gradients(self, model: torch.nn.Module, keep: bool) -> AbstractContextManager[object]:
        """Return the context of a backward pass whose gradients stay with this worker, until one without `keep`."""
        if keep and self.world > 1:
            return cast(AbstractContextManager[object], model.no_sync())
        return nullcontext()
