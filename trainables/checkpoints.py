"""Training states on disk: tensors and plain data, written whole, read with `weights_only=True`."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch

from trainables.locations import read_bytes, write_bytes


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
