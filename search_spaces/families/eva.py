"""EVA, EVA-02, DINOv3 and NaFlexViT's blocks with rotary position embedding."""

from search_spaces.blocks import post_norm, pre_norm

ARGUMENTS = ("rope", "attn_mask", "is_causal")
FORMS = {
    "EvaBlock": pre_norm(*ARGUMENTS, scales=("gamma_1", "gamma_2")),
    "EvaBlockPostNorm": post_norm(*ARGUMENTS),
}
