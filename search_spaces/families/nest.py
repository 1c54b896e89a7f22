"""NesT: attention within the blocks of an image."""

from search_spaces.blocks import pre_norm

FORMS = {"TransformerLayer": pre_norm()}
