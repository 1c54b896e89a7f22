"""LeViT: batch norm in the linear layers, so that attentions alone are units."""

from search_spaces.blocks import Branch, Form

FORMS = {
    "LevitBlock": Form(
        (Branch("attn", (), ("drop_path1",), kind="attn"), Branch("mlp", (), ("drop_path2",), kind="mlp"))
    )
}
