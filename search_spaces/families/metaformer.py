"""CAFormer and other MetaFormers: attention is one of several token mixers; only attentions are units."""

from typing import Any

from search_spaces.blocks import Branch, Form


def _mixer(block: Any) -> str:
    name = type(block.token_mixer).__name__
    return "" if name == "Attention" else f"{name}: mixes tokens, but is no attention"


FORMS = {
    "MetaFormerBlock": Form(
        (
            Branch("token_mixer", ("norm1",), ("drop_path1", "layer_scale1"), kind="attn", skip="res_scale1"),
            Branch("mlp", ("norm2",), ("drop_path2", "layer_scale2"), kind="mlp", skip="res_scale2"),
        ),
        attn_stays=_mixer,
    )
}
