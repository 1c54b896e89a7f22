"""Vision Transformers with pre-norm blocks: ViT, DeiT and its distilled form (timm `VisionTransformer`).

Modifications: a block that loses its attention is replaced by `MlpBlock`, which keeps the names of what stays, so the
state dict shrinks and nothing is renamed; a block that loses its activation gets an `nn.Identity` in its place, and
`merge` then replaces the MLP by the one linear layer it has become.

Method: Depth pruning of attention and activation layers (HetDPT, "Rethinking Depth Pruning for ViTs: A
Heterogeneity-Aware Perspective", PMLR v306).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from search_spaces import UnsupportedModel
from search_spaces.plan import PruningPlan, Unit
from search_spaces.timm_compat import timm


class MlpBlock(nn.Module):
    """What is left of a block without attention: `x + mlp(norm2(x))`; shape (images, tokens, width) in and out."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class GatedAttention(nn.Module):
    """An attention whose output is scaled by a gate: 1 as built, 0 removed."""

    def __init__(self, attn: nn.Module, gate: torch.Tensor) -> None:
        super().__init__()
        self.attn, self.gate = attn, gate

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        return self.gate * self.attn(x, attn_mask=attn_mask, is_causal=is_causal)


class GatedActivation(nn.Module):
    """A blend of an activation (gate 1) and the identity (gate 0)."""

    def __init__(self, act: nn.Module, gate: torch.Tensor) -> None:
        super().__init__()
        self.act, self.gate = act, gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.lerp(x, self.act(x), self.gate.to(x.dtype))


def _blocks(model: nn.Module) -> Any:
    return model.blocks


def units(model: nn.Module) -> tuple[Unit, ...]:
    """Return the units that can still be removed, attentions first, by block.

    Raises:
        UnsupportedModel: a block is not timm's pre-norm `Block`.
    """
    for index, block in enumerate(_blocks(model)):
        if not isinstance(block, timm.models.vision_transformer.Block | MlpBlock):
            raise UnsupportedModel(f"block {index} is a {type(block).__name__}, not a pre-norm ViT block")
    attn = [Unit("attn", i) for i, block in enumerate(_blocks(model)) if not isinstance(block, MlpBlock)]
    act = [Unit("act", i) for i, block in enumerate(_blocks(model)) if _removable_activation(block.mlp)]
    return (*attn, *act)


def _removable_activation(mlp: nn.Module) -> bool:
    """Say whether two plain linear layers have only an activation between them."""
    return (
        isinstance(mlp, timm.layers.Mlp)
        and isinstance(mlp.fc1, nn.Linear)
        and isinstance(mlp.fc2, nn.Linear)
        and isinstance(mlp.norm, nn.Identity)
        and not isinstance(mlp.act, nn.Identity)
    )


@contextmanager
def gates(model: nn.Module) -> Iterator[dict[Unit, torch.Tensor]]:
    """Install one differentiable scalar per unit, 1 = as built, 0 = exactly what `remove` leaves.

    The model is put back as it was when the context ends.
    """
    device = next(model.parameters()).device
    installed = {unit: torch.ones((), device=device, requires_grad=True) for unit in units(model)}
    originals = {unit: _gated_module(model, unit) for unit in installed}
    try:
        for unit, gate in installed.items():
            if unit.kind == "attn":
                _blocks(model)[unit.index].attn = GatedAttention(originals[unit], gate)
            else:
                _blocks(model)[unit.index].mlp.act = GatedActivation(originals[unit], gate)
        yield installed
    finally:
        for unit, module in originals.items():
            if unit.kind == "attn":
                _blocks(model)[unit.index].attn = module
            else:
                _blocks(model)[unit.index].mlp.act = module


def _gated_module(model: nn.Module, unit: Unit) -> nn.Module:
    block = _blocks(model)[unit.index]
    return block.attn if unit.kind == "attn" else block.mlp.act


def remove(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Remove the plan's units in place and return the model; removing in several steps gives the same model.

    A removed attention leaves nothing: its norm, scale and drop-path go with it, and the block is `x + mlp(norm2(x))`.

    Raises:
        UnsupportedModel: a unit of the plan is not there to be removed.
    """
    missing = set(plan.units) - set(units(model))
    if missing:
        names = " ".join(str(unit) for unit in sorted(missing))
        raise UnsupportedModel(f"the model has no removable {names}")
    blocks = _blocks(model)
    for index in plan.act:
        blocks[index].mlp.act = nn.Identity()
    for index in plan.attn:
        blocks[index] = MlpBlock(blocks[index])
    return model


def merge(model: nn.Module) -> nn.Module:
    """Replace, in place, every MLP without activation by the one linear layer it computes; return the model.

    `W = W2 @ W1` and `b = W2 @ b1 + b2` are formed in float64 and rounded once.
    """
    for block in _blocks(model):
        mlp = block.mlp
        if isinstance(mlp, timm.layers.Mlp) and isinstance(mlp.act, nn.Identity):
            block.mlp = _merged(mlp.fc1, mlp.fc2)
    return model


@torch.no_grad()
def _merged(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    merged = nn.Linear(first.in_features, second.out_features, device=first.weight.device, dtype=first.weight.dtype)
    w1, w2 = first.weight.double(), second.weight.double()
    b1 = first.bias.double() if first.bias is not None else w1.new_zeros(len(w1))
    b2 = second.bias.double() if second.bias is not None else w2.new_zeros(len(w2))
    merged.weight.copy_(w2 @ w1)
    merged.bias.copy_(w2 @ b1 + b2)
    merged.weight.requires_grad_(second.weight.requires_grad)
    merged.bias.requires_grad_(second.weight.requires_grad)
    return merged
