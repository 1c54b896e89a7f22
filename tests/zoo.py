"""Small members of every family, and where their attentions and activations are, found without our verbs."""

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from search_spaces.plan import PruningPlan
from search_spaces.timm_compat import timm

VIT = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2}
ATTN, MLP = r"blocks\.\d+\.attn", r"blocks\.\d+\.mlp\.act"
POST = r"blocks\.\d+\.norm1"


@dataclass(frozen=True)
class Member:
    """A small model of a family.

    Attributes:
        name, kwargs: what timm builds.
        attn: matches the paths of the modules whose output, in order, is what an attention adds, or before a scale.
        act: matches the paths of the activations of the MLPs, in order.
        n_attn, n_act: how many units it must have.
        side: of the images, in pixels.
    """

    name: str
    kwargs: dict[str, Any]
    n_attn: int
    n_act: int
    attn: str = ATTN
    act: str = MLP
    side: int = 28
    title: str = field(default="")

    def build(self, **kwargs: Any) -> torch.nn.Module:
        return timm.create_model(self.name, **{"in_chans": 1, "num_classes": 5, **self.kwargs, **kwargs})


def vit(
    name: str, attn: int = 3, act: int = 3, where: str = ATTN, acts: str = MLP, title: str = "", **kwargs: Any
) -> Member:
    return Member(name, {**VIT, **kwargs}, attn, act, where, acts, title=title or name)


blocks = timm.models.vision_transformer
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
LAYERS = r"layers\.\d+\.blocks\.\d+\."
MEMBERS = [
    vit("deit3_small_patch16_224", init_values=0.5),
    vit("vit_base_patch16_clip_224", title="clip"),
    vit("vit_base_patch16_siglip_224", title="siglip"),
    vit("vit_small_patch14_reg4_dinov2", init_values=0.5),
    vit("vit_tiny_patch16_224", qk_norm=True, fc_norm=True, global_pool="avg", title="qk_norm"),
    vit("deit_tiny_distilled_patch16_224"),
    vit("vit_tiny_patch16_224", where=POST, block_fn=blocks.ResPostBlock, init_values=0.5, title="res_post"),
    vit(
        "vit_small_patch16_18x2_224", 6, 6, r"blocks\.\d+\.attns\.\d+\.attn", r"blocks\.\d+\.ffns\.\d+\.mlp\.act",
        init_values=0.5,
    ),
    vit("vit_giant_patch14_dinov2", 3, 0, title="swiglu", init_values=0.5),
    vit("vit_tiny_patch16_224", 3, 0, scale_mlp_norm=True, title="mlp_norm"),
    vit("vit_tiny_patch16_224", attn_layer="diff", title="differential"),
    vit("eva02_tiny_patch14_224", 3, 0, embed_dim=32, title="eva02"),
    vit("eva_giant_patch14_224", embed_dim=32, title="eva"),
    vit("vit_small_patch16_dinov3", title="dinov3", init_values=0.5),
    vit("eva02_tiny_patch14_224", 3, 0, where=POST, use_post_norm=True, title="eva_post"),
    vit("beit_base_patch16_224", title="beit", init_values=0.5),
    vit("beit_base_patch16_224", title="beit_shared", use_shared_rel_pos_bias=True, use_rel_pos_bias=False),
    vit("vit_relpos_small_patch16_224", title="relpos", init_values=0.5),
    vit("vit_srelpos_small_patch16_224", title="srelpos", init_values=0.5),
    vit("vit_relpos_base_patch32_plus_rpn_256", where=POST, title="relpos_post"),
    vit("samvit_base_patch16", title="sam", window_size=3, global_attn_indexes=(1,), neck_chans=16),
    vit("cait_xxs24_224", 3, 5, r"blocks\w*\.\d+\.attn", r"blocks\w*\.\d+\.mlp\.act", init_values=0.5),
    Member(
        "xcit_nano_12_p16_224", {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "eta": 0.5}, 3, 5,
        r"blocks\.\d+\.attn", r"blocks\.\d+\.mlp\.act", 64,
    ),
    Member("swin_tiny_patch4_window7_224", SWIN, 4, 4, LAYERS + "attn", LAYERS + r"mlp\.act", 32),
    Member("swinv2_tiny_window8_256", SWIN, 4, 4, LAYERS + "norm1", LAYERS + r"mlp\.act", 32),
    Member("naflexvit_base_patch16_gap", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 3, 3, side=64),
]  # fmt: skip


def skipping(model: torch.nn.Module, member: Member, plan: PruningPlan) -> ExitStack:
    """Make the model leave out, by hooks and while the context lasts, what a plan removes."""
    stack = ExitStack()
    for indices, pattern, hook in ((plan.attn, member.attn, nothing), (plan.act, member.act, as_given)):
        found = [module for path, module in model.named_modules() if re.fullmatch(".*?" + pattern, path)]
        for index in indices:
            stack.callback(found[index].register_forward_hook(hook).remove)
    return stack


def nothing(module: torch.nn.Module, given: Any, output: Any) -> Any:
    first = torch.zeros_like(output[0] if isinstance(output, tuple) else output)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def as_given(module: torch.nn.Module, given: Any, output: Any) -> Any:
    return given[0]
