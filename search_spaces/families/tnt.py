"""TNT: blocks of two streams of tokens, whose attentions stay."""

from search_spaces.blocks import mlp_only

FORMS = {"Block": mlp_only("Block: two streams of tokens, one of them within the patches", "mlp_in", "mlp")}
