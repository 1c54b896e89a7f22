"""Twins: attention within windows and attention to a coarser grid, in turn."""

from search_spaces.blocks import pre_norm

FORMS = {"Block": pre_norm("size")}
