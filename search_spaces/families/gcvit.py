"""GC ViT: attention in windows, in every second block with queries of the whole image."""

from search_spaces.blocks import pre_norm

FORMS = {"GlobalContextVitBlock": pre_norm("q_global", attn="_window_attn", parts=("attn",), scales=("ls1", "ls2"))}
