"""ConViT: attention that begins as a convolution."""

from search_spaces.blocks import pre_norm

FORMS = {"Block": pre_norm(drops=("drop_path", "drop_path"))}
