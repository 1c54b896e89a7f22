"""EfficientFormer: the blocks of its last stage are transformer blocks."""

from search_spaces.blocks import pre_norm

FORMS = {"MetaBlock1d": pre_norm(attn="token_mixer", scales=("ls1", "ls2"))}
