"""MaxViT and its kin: attention within windows and over a grid; the convolutions between them stay."""

from typing import Any

from torch import nn

from search_spaces.blocks import pre_norm


def _shortens(block: Any) -> str:
    same = isinstance(block.shortcut, nn.Identity)
    return "" if same else f"{type(block).__name__}: its attention changes the number and width of the tokens"


SCALES = ("ls1", "ls2")
FORMS = {
    "PartitionAttentionCl": pre_norm(attn="_partition_attn", parts=("attn",), scales=SCALES),
    "PartitionAttention2d": pre_norm(attn="_partition_attn", parts=("attn",), scales=SCALES),
    "ParallelPartitionAttention": pre_norm(attn="_partition_attn", parts=("attn_block", "attn_grid"), scales=SCALES),
    "TransformerBlock2d": pre_norm("shared_rel_pos", scales=SCALES, attn_stays=_shortens),
}
