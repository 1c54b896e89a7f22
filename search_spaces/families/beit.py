"""BEiT and BEiT-2: relative position biases of each block or shared by all."""

from search_spaces.blocks import pre_norm

FORMS = {"Block": pre_norm("shared_rel_pos_bias", scales=("gamma_1", "gamma_2"))}
