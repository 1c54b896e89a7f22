"""Small members of every family, and where their attentions and activations are, found without our verbs."""

import re
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
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
        name, kwargs: what timm builds; with a dot, a class of one of its modules.
        attn: matches the paths of the modules whose output, in order, is what an attention adds, or before a scale.
        act: matches the paths of the activations of the MLPs, in order.
        n_attn, n_act: how many units it must have.
        side, chans: of the images, in pixels and channels.
        orphans: matches the weights that nothing uses where every other attention is gone, counted from the first.
    """

    name: str
    kwargs: dict[str, Any]
    n_attn: int
    n_act: int
    attn: str = ATTN
    act: str = MLP
    side: int = 28
    title: str = ""
    orphans: str = "^$"
    chans: int = 1

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return self.title or self.name.rpartition(".")[2]

    def build(self, **kwargs: Any) -> torch.nn.Module:
        kwargs = {"in_chans": self.chans, "num_classes": 5, **self.kwargs, **kwargs}
        module, _, cls = self.name.rpartition(".")
        return getattr(getattr(timm.models, module), cls)(**kwargs) if module else timm.create_model(cls, **kwargs)


def vit(
    name: str, attn: int = 3, act: int = 3, where: str = ATTN, acts: str = MLP, title: str = "", **kwargs: Any
) -> Member:
    return Member(name, {**VIT, **kwargs}, attn, act, where, acts, title=title or name)


blocks = timm.models.vision_transformer
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
mixers = timm.models.metaformer
STEM = {"embed_dim": (16, 16), "depths": (1, 1), "stem_width": 8}
HEADS = timm.models.maxxvit.MaxxVitTransformerCfg(dim_head=8)
maxvit = timm.models.maxxvit.MaxxVitCfg(**STEM, block_type=("M", "M"), transformer_cfg=HEADS)
coatnet = timm.models.maxxvit.MaxxVitCfg(embed_dim=(16, 32), depths=(1, 2), stem_width=8, block_type=("C", "T"))
STAGES = r"stages\.\d+\.blocks\.\d+\."
LAYERS = r"layers\.\d+\.blocks\.\d+\."
fused = partial(blocks.ParallelScalingBlock, fuse_out_proj=True)
RARER = [
    Member(
        "csatv2",
        {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)},
        2,
        2,
        r"stages\.[23]\.2\.attn",
        r"stages\.[23]\.\d\.mlp\.act",
        128,
        chans=3,
    ),
    Member(
        "twins_svt_small",
        {
            "img_size": 64,
            "embed_dims": (16, 32),
            "depths": (2, 2),
            "num_heads": (2, 2),
            "sr_ratios": (4, 2),
            "wss": (4, 4),
            "mlp_ratios": (2, 2),
        },
        4,
        4,
        r"blocks\.\d+\.\d+\.attn",
        r"blocks\.\d+\.\d+\.mlp\.act",
        64,
    ),
    Member(
        "pvt_v2.PyramidVisionTransformerV2",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2)},
        4,
        0,
        side=64,
    ),
    Member(
        "nest.Nest",
        {"img_size": 64, "depths": (1, 1, 2), "embed_dims": (16, 32, 32), "num_heads": (2, 2, 2)},
        4,
        4,
        r"transformer_encoder\.\d+\.attn",
        r"transformer_encoder\.\d+\.mlp\.act",
        64,
    ),
    Member(
        "convit_tiny",
        {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 4, "num_heads": 2, "local_up_to_layer": 2},
        4,
        4,
    ),
    Member(
        "gcvit.GlobalContextVit",
        {
            "img_size": 64,
            "depths": (1, 1, 2, 1),
            "window_size": (2, 2, 2, 2),
            "embed_dim": 16,
            "num_heads": (2, 2, 2, 2),
            "layer_scale": 0.5,
        },
        5,
        5,
        side=64,
        orphans="global_block",
    ),
    Member(
        "efficientformer.EfficientFormer",
        {"depths": (1, 1, 1, 3), "embed_dims": (8, 8, 16, 32), "num_vit": 2, "layer_scale_init_value": 0.5},
        2,
        2,
        r"stages\.3\.blocks\.[23]\.token_mixer",
        r"stages\.3\.blocks\.[23]\.mlp\.act",
        224,
    ),
    Member(
        "volo.VOLO",
        {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (24, 24, 24, 24), "num_heads": (2, 2, 2, 2)},
        4,
        6,
        r"network\.\d+\.\d+\.attn",
        r"mlp\.act",
        64,
    ),
    Member(
        "tnt.TNT",
        {"img_size": 64, "embed_dim": 32, "inner_dim": 8, "depth": 3, "num_heads_outer": 2},
        0,
        6,
        r"attn_out",
        r"blocks\.\d+\.mlp(_in)?\.act",
        64,
    ),
    Member(
        "levit.Levit",
        {"img_size": 64, "embed_dim": (32, 48), "key_dim": 8, "depth": (2, 2), "num_heads": 2},
        4,
        0,
        r"blocks\.\d+\.attn",
        side=64,
    ),
    Member(
        "hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 2, 2, 1)}, 3, 6, side=64
    ),
    Member(
        "hieradet_sam2.HieraDet",
        {
            "embed_dim": 16,
            "stages": (1, 2, 2, 1),
            "global_att_blocks": (4,),
            "window_spec": (8, 4, 6, 4),
            "init_values": 0.5,
        },
        3,
        6,
        side=64,
    ),
    Member(
        "mvitv2.MultiScaleVit",
        {"img_size": (64, 64), "cfg": timm.models.mvitv2.MultiScaleVitCfg(depths=(1, 2, 2, 1), embed_dim=16)},
        3,
        6,
        side=64,
    ),
    Member(
        "maxxvit.MaxxVit",
        {"img_size": 64, "cfg": maxvit},
        4,
        4,
        r"attn_(block|grid)\.attn",
        r"attn_(block|grid)\.mlp\.act",
        64,
    ),
    Member("maxxvit.MaxxVit", {"img_size": 64, "cfg": coatnet}, 1, 0, r"blocks\.\d+\.attn", side=64, title="coatnet"),
    Member(
        "metaformer.MetaFormer",
        {
            "dims": (8, 8, 32, 32),
            "depths": (1, 1, 2, 2),
            "token_mixers": [mixers.SepConv] * 2 + [mixers.Attention] * 2,
            "norm_layers": [mixers.LayerNorm2dNoBias] * 2 + [mixers.LayerNormNoBias] * 2,
            "mlp_act": torch.nn.GELU,
        },
        4,
        4,
        r"token_mixer",
        r"\.mlp\.act",
        64,
    ),
    Member(
        "coat_lite_tiny",
        {"img_size": 64, "serial_depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)},
        4,
        4,
        r"factoratt_crpe",
        r"mlp\.act",
        64,
        orphans="crpe",
    ),
    Member(
        "davit.DaVit",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 2, 2)},
        8,
        8,
        r"\.attn",
        r"mlp\.act",
        64,
    ),
    Member(
        "tiny_vit_5m_224",
        {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)},
        3,
        3,
        r"\.attn",
        r"stages\.[1-3]\.blocks\.\d+\.mlp\.act",
        64,
    ),
    Member("vitamin_small_224", {"img_size": 64, "depth": 2}, 2, 0, side=64),
    Member("mobilevit_xxs", {}, 9, 9, r"transformer\.\d+\.attn", r"transformer\.\d+\.mlp\.act", 64),
    Member(
        "pit.PoolingVisionTransformer",
        {"img_size": 64, "base_dims": (16, 16, 16), "depth": (1, 2, 1), "heads": (1, 1, 1)},
        4,
        4,
        side=64,
    ),
    Member(
        "crossvit.CrossVit",
        {
            "img_size": 64,
            "embed_dim": (16, 32),
            "depth": ((1, 2, 0), (1, 2, 0)),
            "num_heads": (2, 2),
            "img_scale": (1.0, 1.0),
        },
        6,
        6,
        r"blocks\.\d+\.blocks\.\d+\.\d+\.attn",
        r"blocks\.\d+\.blocks\.\d+\.\d+\.mlp\.act",
        64,
    ),
    Member("vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 3, "embed_dim": 32, "num_heads": 2}, 3, 3, side=64),
    Member(
        "deepseek_vit.DeepseekVitClassifier",
        {"img_size": 84, "embed_dim": 32, "depth": 2, "num_heads": 2},
        2,
        0,
        side=84,
    ),
    Member(
        "gemma4_vit.Gemma4VitClassifier",
        {"img_size": 96, "embed_dim": 32, "depth": 2, "num_heads": 2, "head_dim": 16, "intermediate_size": 64},
        2,
        0,
        r"blocks\.\d+\.norm2",
        side=96,
    ),
    Member("naflexvit_base_patch16_gap", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 3, 3, side=64),
]
MEMBERS = [
    vit("deit3_small_patch16_224", init_values=0.5),
    vit("vit_base_patch16_clip_224", title="clip"),
    vit("vit_base_patch16_siglip_224", title="siglip"),
    vit("vit_small_patch14_reg4_dinov2", init_values=0.5),
    vit("vit_tiny_patch16_224", qk_norm=True, fc_norm=True, global_pool="avg", title="qk_norm"),
    vit("deit_tiny_distilled_patch16_224"),
    vit("vit_tiny_patch16_224", where=POST, block_fn=blocks.ResPostBlock, init_values=0.5, title="res_post"),
    vit(
        "vit_small_patch16_18x2_224",
        6,
        6,
        r"blocks\.\d+\.attns\.\d+\.attn",
        r"blocks\.\d+\.ffns\.\d+\.mlp\.act",
        init_values=0.5,
    ),
    vit("vit_pwee_patch16_reg1_gap_256", 3, 0, r"blocks\.\d+\.attn_out_proj", title="parallel", init_values=0.5),
    vit("vit_tiny_patch16_224", 3, 0, r"blocks\.\d+\.out_proj", block_fn=fused, title="parallel_fused"),
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
        "xcit_nano_12_p16_224",
        {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "eta": 0.5},
        3,
        5,
        r"blocks\.\d+\.attn",
        r"blocks\.\d+\.mlp\.act",
        64,
    ),
    Member("swin_tiny_patch4_window7_224", SWIN, 4, 4, LAYERS + "attn", LAYERS + r"mlp\.act", 32),
    Member("swinv2_tiny_window8_256", SWIN, 4, 4, LAYERS + "norm1", LAYERS + r"mlp\.act", 32),
    Member("swinv2_cr_tiny_ns_224", {**SWIN, "extra_norm_period": 2}, 4, 4, STAGES + "norm1", MLP, 32),
    *RARER,
]


def skipping(model: torch.nn.Module, member: Member, plan: PruningPlan) -> ExitStack:
    """Make the model leave out, by hooks and while the context lasts, what a plan removes."""
    stack = ExitStack()
    for indices, pattern, hook in ((plan.attn, member.attn, nothing), (plan.act, member.act, as_given)):
        found = [module for path, module in model.named_modules() if re.fullmatch(".*?" + pattern, path)]
        for index in indices:
            stack.callback(found[index].register_forward_hook(hook).remove)
    return stack


def nothing(module: torch.nn.Module, given: Any, output: Any) -> Any:
    if isinstance(module, torch.nn.Linear) and module.in_features > module.out_features:
        # It is the MLP's last layer too; the attention has as many inputs as there are outputs, the first ones.
        return output - given[0][..., : module.out_features] @ module.weight[:, : module.out_features].T
    first = torch.zeros_like(output[0] if isinstance(output, tuple) else output)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def as_given(module: torch.nn.Module, given: Any, output: Any) -> Any:
    return given[0]
