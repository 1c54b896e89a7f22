"""CaiT: blocks with talking heads, then two that only the class token reads the image by."""

from search_spaces.blocks import mlp_only, pre_norm

FORMS = {
    "LayerScaleBlock": pre_norm(scales=("gamma_1", "gamma_2"), drops=("drop_path", "drop_path")),
    "LayerScaleBlockClassAttn": mlp_only("ClassAttn: only by these attentions the class token sees the image", "mlp"),
}
