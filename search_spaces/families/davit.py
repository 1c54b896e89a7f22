"""DaViT: attention in windows and attention between channels, in turn, with convolutions before each branch."""

from typing import Any

import torch
import torch.nn.functional as F

from search_spaces.blocks import Branch, Form
from search_spaces.timm_compat import timm

windows = timm.models.davit


def _within_windows(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the attention of tokens of shape (images, height, width, channels)."""
    height, width, channels = x.shape[1:]
    side = block.window_size
    x = F.pad(x, (0, 0, 0, -width % side[1], 0, -height % side[0]))
    cut = windows.window_partition(x, side).view(-1, side[0] * side[1], channels)
    cut = block.attn(cut).view(-1, side[0], side[1], channels)
    return windows.window_reverse(cut, side, x.shape[1], x.shape[2])[:, :height, :width].contiguous()


def _between_channels(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.attn(x.flatten(1, 2)).view(x.shape)


def _first(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.cpe1(x).permute(0, 2, 3, 1)


def _second(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.cpe2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _end(block: Any, x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def _form(attention: Any) -> Form:
    attn = Branch(attention, ("norm1",), ("drop_path1",), parts=("attn",), kind="attn")
    return Form((_first, attn, _second, Branch("mlp", ("norm2",), ("drop_path2",), kind="mlp"), _end))


FORMS = {"SpatialBlock": _form(_within_windows), "ChannelBlock": _form(_between_channels)}
