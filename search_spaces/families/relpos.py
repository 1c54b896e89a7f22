"""ViT with relative position, pre-norm and post-norm."""

from search_spaces.blocks import post_norm, pre_norm

FORMS = {
    "RelPosBlock": pre_norm("shared_rel_pos", scales=("ls1", "ls2")),
    "ResPostRelPosBlock": post_norm("shared_rel_pos"),
}
