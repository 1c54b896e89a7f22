"""Hiera: attention in mask units and, later, over the whole image; pooling attentions stay."""

from typing import Any

from search_spaces.blocks import pre_norm


def _changes_shape(block: Any) -> str:
    return f"{type(block).__name__}: its attention pools the tokens" if block.do_expand else ""


FORMS = {"HieraBlock": pre_norm(scales=("ls1", "ls2"), attn_stays=_changes_shape)}
