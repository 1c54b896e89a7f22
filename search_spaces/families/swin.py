"""Swin and Swin-V2: stages of differing width, attention in windows, shifted in every second block.

A block without attention mixes no tokens. Where a shifted block loses its attention, the windows of its stage exchange
nothing there: across the edges of windows, tokens meet only in shifted blocks that stay and where patches merge.
"""

from search_spaces.blocks import post_norm, pre_norm

WINDOWS = ("attn", "attn_mask")

FORMS = {
    "SwinTransformerBlock": pre_norm(attn="_attn", parts=WINDOWS),
    "SwinTransformerV2Block": post_norm(attn="_attn", parts=WINDOWS),
    "SwinTransformerV2CrBlock": post_norm(
        attn="_shifted_window_attn", parts=WINDOWS, last=(lambda block, x: block.norm3(x),)
    ),
}
