"""TinyViT: attention in windows with a norm of its own, then a convolution, then the MLP with its own."""

from typing import Any

import torch
import torch.nn.functional as F

from search_spaces.blocks import Branch, Form


def _attention(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the attention of tokens of shape (images, height, width, channels), in windows."""
    height, width, channels = x.shape[1:]
    side = block.window_size
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = x.shape[1] // side, x.shape[2] // side
    cut = x.view(-1, rows, side, columns, side, channels).transpose(2, 3).reshape(-1, side * side, channels)
    x = block.attn(cut).view(-1, rows, columns, side, side, channels).transpose(2, 3)
    return x.reshape(-1, rows * side, columns * side, channels)[:, :height, :width].contiguous()


def _convolution(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


FORMS = {
    "TinyVitBlock": Form(
        (
            Branch(_attention, (), ("drop_path1",), parts=("attn",), kind="attn"),
            _convolution,
            Branch("mlp", (), ("drop_path2",), kind="mlp"),
        )
    )
}
