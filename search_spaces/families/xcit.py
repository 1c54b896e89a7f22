"""XCiT: attention between channels, with a convolution between attention and MLP that always stays."""

from search_spaces.blocks import Branch, Form, mlp_only

FORMS = {
    "XCABlock": Form(
        (
            Branch("attn", ("norm1",), ("gamma1", "drop_path1"), kind="attn"),
            Branch("local_mp", ("norm3",), ("gamma3", "drop_path3"), ("H", "W")),
            Branch("mlp", ("norm2",), ("gamma2", "drop_path2"), kind="mlp"),
        ),
        ("H", "W"),
    ),
    "ClassAttentionBlock": mlp_only("ClassAttn: only by these attentions the class token sees the image", "mlp"),
}
