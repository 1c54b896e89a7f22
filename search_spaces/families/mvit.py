"""MViT-v2: attention to pooled keys and values; attentions that pool the tokens themselves stay."""

from typing import Any

import torch

from search_spaces.blocks import Branch, Form


def _attention(block: Any, x: torch.Tensor, feat_size: list[int]) -> torch.Tensor:
    return block.attn(x, feat_size)[0]


def _pools(block: Any) -> str:
    changes = (block.shortcut_proj_attn, block.shortcut_pool_attn, block.shortcut_proj_mlp)
    same = all(change is None for change in changes)
    return "" if same else f"{type(block).__name__}: it changes the number or width of the tokens"


FORMS = {
    "MultiScaleBlock": Form(
        (
            Branch(_attention, ("norm1",), ("drop_path1",), ("feat_size",), ("attn",), "attn"),
            Branch("mlp", ("norm2",), ("drop_path2",), kind="mlp"),
        ),
        ("feat_size",),
        _pools,
        lambda x, feat_size: (x, feat_size),
    )
}
