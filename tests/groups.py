"""Groups of processes that train together over gloo, with no Ray."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from trainables.group import Group


def in_a_group(world: int, target: Callable[..., Any], *args: Any, most: int = 0) -> list[Any]:
    """Call `target(group, *args)` in as many processes as the group has workers; return what each returned, by rank."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, mp_context=get_context("spawn")) as pool:
        groups = [Group(rank, world, most or world) for rank in range(world)]
        return [future.result() for future in [pool.submit(_joined, folder, group, target, args) for group in groups]]


def _joined(folder: str, group: Group, target: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=group.rank, world_size=group.world
    )
    try:
        return target(group, *args)
    finally:
        torch.distributed.destroy_process_group()
