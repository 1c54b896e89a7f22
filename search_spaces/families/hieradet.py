"""Hiera as Segment Anything 2 has it: windows, and pooling attentions, which stay."""

from typing import Any

import torch
import torch.nn.functional as F

from search_spaces.blocks import pre_norm
from search_spaces.timm_compat import timm

windows = timm.models.vision_transformer_sam


def _attention(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the attention of tokens (images, height, width, channels), in windows where there are any."""
    if not block.is_windowed:
        return block.attn(x)
    height, width = x.shape[1:3]
    side = block.window_size
    x = F.pad(x, (0, 0, 0, -width % side[1], 0, -height % side[0]))
    shape, padded = x.shape, x.shape[1:3]
    x = x.view(shape[0], padded[0] // side[0], side[0], padded[1] // side[1], side[1], -1).transpose(2, 3)
    cut = block.attn(x.reshape(-1, side[0], side[1], shape[-1]))
    x = cut.view(shape[0], padded[0] // side[0], padded[1] // side[1], side[0], side[1], -1).transpose(2, 3)
    return x.reshape(shape)[:, :height, :width].contiguous()


def _pools(block: Any) -> str:
    same = block.dim == block.dim_out and block.q_stride is None
    return "" if same else f"{type(block).__name__}: its attention changes the number and width of the tokens"


FORMS = {"MultiScaleBlock": pre_norm(attn=_attention, parts=("attn",), scales=("ls1", "ls2"), attn_stays=_pools)}
