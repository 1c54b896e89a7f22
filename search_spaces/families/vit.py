"""timm's `VisionTransformer`: ViT, DeiT-III, CLIP and SigLIP towers, DINOv2, and DeiT's distilled form."""

from typing import Any

from torch import nn

from search_spaces.blocks import Branch, Form, post_norm, pre_norm
from search_spaces.families.parallel import FORM

ARGUMENTS = ("attn_mask", "is_causal")


def _in_parallel(count: int) -> Form:
    """Return a form whose block adds `count` attentions of the same tokens, then as many MLPs."""
    attns = tuple(
        Branch(
            f"attns.{i}.attn", (f"attns.{i}.norm",), (f"attns.{i}.ls", f"attns.{i}.drop_path"), ARGUMENTS, kind="attn"
        )
        for i in range(count)
    )
    mlps = tuple(
        Branch(f"ffns.{i}.mlp", (f"ffns.{i}.norm",), (f"ffns.{i}.ls", f"ffns.{i}.drop_path"), kind="mlp")
        for i in range(count)
    )
    return Form((attns, mlps), ARGUMENTS)


FORMS = {
    "Block": pre_norm(*ARGUMENTS, scales=("ls1", "ls2")),
    "ResPostBlock": post_norm(*ARGUMENTS),
    "ParallelThingsBlock": _in_parallel(2),
    "ParallelScalingBlock": FORM,
}


def _reader(model: Any) -> nn.Module:
    # Between the blocks and a norm behind the pooling must be nothing but the pooling.
    return model.fc_norm if isinstance(model.norm, nn.Identity) and model.attn_pool is None else model.norm


READERS = {"VisionTransformer": _reader, "VisionTransformerDistilled": _reader}
