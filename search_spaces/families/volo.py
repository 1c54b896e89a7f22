"""VOLO: outlook attention, then attention; the class token reads the image in blocks of its own."""

from search_spaces.blocks import mlp_only, pre_norm

FORMS = {
    "Outlooker": pre_norm(),
    "Transformer": pre_norm(),
    "ClassBlock": mlp_only("ClassAttention: only by these attentions the class token sees the image", "mlp"),
}
