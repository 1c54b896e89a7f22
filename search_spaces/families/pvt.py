"""PVT-v2: attention to a coarser grid; its MLPs have a convolution inside and keep their activations."""

from search_spaces.blocks import pre_norm

FORMS = {"Block": pre_norm("feat_size", mlp_takes=("feat_size",))}
