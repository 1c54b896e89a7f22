"""Gemma's image encoder: a norm before and one behind each branch."""

from search_spaces.blocks import Branch, Form

ARGUMENTS = ("rope_cos", "rope_sin", "attn_mask")
FORMS = {
    "Gemma4Block": Form(
        (
            Branch("attn", ("norm1",), ("norm2", "drop_path"), ARGUMENTS, kind="attn"),
            Branch("mlp", ("norm3",), ("norm4", "drop_path"), kind="mlp"),
        ),
        ARGUMENTS,
    )
}
