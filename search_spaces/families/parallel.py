"""ViT-22B's block: attention and MLP side by side, with one linear layer before both.

The MLP's first linear layer is rows of `in_proj`, and may be columns of `out_proj` too, so its activation is no unit.
Without the attention `in_proj` keeps its size until the merge, which leaves only the rows that are used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from search_spaces.blocks import Branch, Form

ARGUMENTS = ("attn_mask", "is_causal")


def _attention(
    block: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
) -> torch.Tensor:
    """Return what the attention adds to tokens of shape (images, tokens, width)."""
    hidden, width = block.in_split[0], x.shape[-1]
    bias = block.in_proj.bias[hidden:] if block.in_proj.bias is not None else None
    heads = F.linear(x, block.in_proj.weight[hidden:], bias).unflatten(-1, (3, block.num_heads, -1))
    q, k, v = (each.transpose(1, 2) for each in heads.unbind(2))
    dropped = block.attn_drop.p if block.training else 0.0
    q, k = block.q_norm(q), block.k_norm(k)
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropped, is_causal=is_causal)
    seen = seen.transpose(1, 2).flatten(2)
    # The bias of a shared `out_proj` is left to the MLP.
    return F.linear(seen, block.out_proj.weight[:, :width]) if block.out_proj is not None else block.attn_out_proj(seen)


def _mlp(block: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = block.in_split[0]
    bias = block.in_proj.bias[:hidden] if block.in_proj.bias is not None else block.mlp_bias
    x = block.mlp_drop(block.mlp_act(F.linear(x, block.in_proj.weight[:hidden], bias)))
    if block.out_proj is None:
        return block.mlp_out_proj(x)
    return F.linear(x, block.out_proj.weight[:, -hidden:], block.out_proj.bias)


@torch.no_grad()
def _shrink(block: Any) -> None:
    """Leave the MLP's part of shared linear layers."""
    hidden = block.in_split[0]
    rows = block.in_proj
    block.in_proj = _linear(rows.weight[:hidden], rows.bias[:hidden] if rows.bias is not None else None)
    if block.out_proj is not None:
        block.out_proj = _linear(block.out_proj.weight[:, -hidden:], block.out_proj.bias)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


BEFORE, BEHIND = ("in_norm",), ("ls", "drop_path")
FORM = Form(
    (
        (
            Branch(_attention, BEFORE, BEHIND, ARGUMENTS, ("attn_out_proj", "q_norm", "k_norm"), "attn"),
            Branch(_mlp, BEFORE, BEHIND, (), ("in_proj", "out_proj", "mlp_out_proj", "mlp_act", "mlp_bias"), "mlp"),
        ),
    ),
    ARGUMENTS,
    shrink=_shrink,
)
