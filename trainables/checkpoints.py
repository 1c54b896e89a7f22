"""Training states on disk: tensors and plain data, written whole, read with `weights_only=True`."""

from __future__ import annotations

import io
import re
import time
import warnings
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import torch
from pyarrow import fs

from trainables.locations import read_bytes, resolve, write_bytes


def save_state(location: str, state: dict[str, Any]) -> None:
    """Write a state; a reader sees the old one or the new one.

    Raises:
        OSError: the place cannot be written to.
    """
    stream = io.BytesIO()
    torch.save(state, stream)
    write_bytes(location, stream.getvalue())


def load_state(location: str) -> dict[str, Any] | None:
    """Read a state; None when there is none, or, with a warning, when it is broken: the work is then begun again."""
    try:
        content = read_bytes(location)
    except FileNotFoundError:
        return None
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes torch.load raise errors of many kinds
        warnings.warn(f"beginning again, because {location} is broken ({type(error).__name__})", stacklevel=2)
        return None
    return state


class Checkpoints:
    """The newest states of a training: `state.pt`, and the older ones that are kept as `state-EPOCH.pt` beside it."""

    def __init__(self, location: str, every: int = 1, seconds: float = 0.0, kept: int = 1) -> None:
        """
        Args:
            location: place or URI of the newest state.
            every: epochs between two states, at least.
            seconds: seconds between two states, at least.
            kept: how many are kept.
        """
        self._location, self._every, self._seconds, self._kept = location, every, seconds, kept
        self._written = time.monotonic()
        self.newest = 0
        """The epoch of the newest state, 0 where there is none."""

    def offer(self, epoch: int, state: Callable[[], dict[str, Any]]) -> None:
        """Write a state, unless one was written not long ago.

        Raises:
            OSError: the place cannot be written to.
        """
        soon = epoch - self.newest < self._every or time.monotonic() - self._written < self._seconds
        if soon:
            return
        if self.newest and self._kept > 1:
            filesystem, path = resolve(self._location)
            filesystem.copy_file(path, resolve(self._older(self.newest))[1])
            for old in self._all_older()[self._kept - 1 :]:
                filesystem.delete_file(resolve(old)[1])
        save_state(self._location, state())
        self.newest, self._written = epoch, time.monotonic()

    def load(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """Return the newest state that is whole and `fits`, and go on from it; None where there is none."""
        for location in (self._location, *self._all_older()):
            state = load_state(location)
            if state is not None and fits(state):
                self.newest = state["training"]["epochs_done"]
                return state
        return None

    def _older(self, epoch: int) -> str:
        return f"{self._location.removesuffix('.pt')}-{epoch:06d}.pt"

    def _all_older(self) -> list[str]:
        """Return where the older states are, the newest first."""
        filesystem, path = resolve(self._location)
        folder = fs.FileSelector(str(PurePosixPath(path).parent), allow_not_found=True)
        stem = PurePosixPath(path).stem
        found = (re.fullmatch(rf"{stem}-(\d{{6,}})\.pt", info.base_name) for info in filesystem.get_file_info(folder))
        return [self._older(epoch) for epoch in sorted((int(match[1]) for match in found if match), reverse=True)]
