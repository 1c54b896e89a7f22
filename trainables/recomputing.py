"""Activation checkpointing: what is between blocks is kept, the rest computed again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from search_spaces import BadInput
from search_spaces.blocks import blocks_of
from trainables.dense import build_model
from trainables.tasks import Task


def recompute_activations(model: torch.nn.Module, *, blocks_stay: bool) -> None:
    """Make a model keep only the activations between its blocks: as timm does it, or around every block.

    Args:
        model: changed in place.
        blocks_stay: whether the blocks are the same modules through the whole training.

    Raises:
        BadInput: timm cannot do it for this model, and its blocks do not stay.
    """
    setting: Any = getattr(model, "set_grad_checkpointing", None)
    try:
        if setting is not None:
            setting(enable=True)
            return
    except (AssertionError, NotImplementedError):
        pass
    if not blocks_stay:
        raise BadInput(
            f"recompute_activations cannot be had for {type(model).__name__} where its blocks change in training, in "
            "the probe and with --attention double: leave it out"
        )
    for _, block, _ in list(blocks_of(model)):
        block.forward = partial(_recomputed, block.forward)


def check_recomputing(task: Task) -> None:
    """Make sure that a task's model can recompute activations in trainings that change its blocks.

    Raises:
        BadInput: it cannot.
    """
    recompute_activations(build_model(task.model, seed=task.seed), blocks_stay=False)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a block's own forward pass; its activations are not kept where there will be a backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
