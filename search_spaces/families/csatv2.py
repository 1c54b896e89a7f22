"""CSATv2: transformer blocks over feature maps; those that pool the map keep their attentions."""

from typing import Any

import torch

from search_spaces.blocks import Branch, Form


def _tokens_last(block: Any, x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def _channels_first(block: Any, x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def _attention(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the attention of tokens of shape (images, height, width, channels)."""
    placed = block.pos_embed(x.flatten(1, 2), (x.shape[1], x.shape[2]))
    return block.attn(placed).view(*x.shape[:3], -1)


def _pools(block: Any) -> str:
    return f"{type(block).__name__}: its attention pools the tokens" if block.downsample else ""


FORMS = {
    "TransformerBlock": Form(
        (
            _tokens_last,
            Branch(_attention, ("norm1",), ("ls1", "drop_path1"), parts=("attn", "pos_embed"), kind="attn"),
            Branch("mlp", ("norm2",), ("ls2", "drop_path2"), kind="mlp"),
            _channels_first,
        ),
        attn_stays=_pools,
    )
}
