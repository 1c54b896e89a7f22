"""Segment Anything's image encoder: windows in most blocks, relative position."""

from typing import Any

import torch

from search_spaces.blocks import pre_norm
from search_spaces.timm_compat import timm

windows = timm.models.vision_transformer_sam


def _attention(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the attention of tokens (images, height, width, channels), in windows where there are any."""
    if not block.window_size:
        return block.attn(x)
    cut, padded = windows.window_partition(x, block.window_size)
    return windows.window_unpartition(block.attn(cut), block.window_size, x.shape[1:3], padded)


FORMS = {"Block": pre_norm(attn=_attention, parts=("attn",), scales=("ls1", "ls2"))}
