"""Vision Transformers with pre-norm blocks: ViT, DeiT and its distilled form (timm `VisionTransformer`).

Modifications: a block that loses its attention is replaced by `MlpBlock` (`zero`) or `DoubleBlock` (`double`), or its
attention by `NoAttention` (`identity`); all keep the names of what stays, so the state dict shrinks and nothing is
renamed. A block that loses its activation gets an `nn.Identity` in its place, and `merge` then replaces the MLP by the
one linear layer it has become.

Method: Depth pruning of attention and activation layers (HetDPT, "Rethinking Depth Pruning for ViTs: A
Heterogeneity-Aware Perspective", PMLR v306). Its code adds a GELU on the output of a block that lost both units; here
nothing is added. `double` with its decay: NOSE ("MLP can be a good transformer learner", CVPR 2024).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from search_spaces import Offer, UnsupportedModel
from search_spaces.plan import KINDS, Attention, PruningPlan, Unit
from search_spaces.timm_compat import timm


class MlpBlock(nn.Module):
    """What is left of a block without attention: `x + mlp(norm2(x))`; shape (images, tokens, width) in and out."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class DoubleBlock(MlpBlock):
    """What `double` leaves of a block: `2 x + mlp(norm2(2 x))`; shapes as in `MlpBlock`."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        return super().forward(2 * x)


class FadingBlock(MlpBlock):
    """A block between as built (gate 1) and `DoubleBlock` (gate 0): first `(2 - gate) x + gate attn(norm1(x))`.

    Modules and weights have the block's names and order. The attention is computed even at gate 0.
    """

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module

    def __init__(self, block: nn.Module, gate: torch.Tensor | float) -> None:
        nn.Module.__init__(self)
        for name, module in block.named_children():
            self.add_module(name, module)
        self.gate = gate

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        branch = self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return super().forward((2 - self.gate) * x + self.gate * branch)


class NoAttention(nn.Module):
    """What `identity` leaves in an attention's place: it hands on what it is given, the normalised tokens."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        return x


class GatedAttention(nn.Module):
    """An attention, gate 1, blended with nothing or with `NoAttention`, gate 0."""

    def __init__(self, attn: nn.Module, gate: torch.Tensor, attention: Attention) -> None:
        super().__init__()
        self.attn, self.gate, self.attention = attn, gate, attention

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        there = self.attn(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.gate * there if self.attention == "zero" else x + self.gate * (there - x)


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
    found = offered(model)
    return (*(Unit("attn", i) for i in found.attn), *(Unit("act", i) for i in found.act))


def offered(model: nn.Module) -> Offer:
    """Say what can be removed, and why the rest cannot; see `search_spaces.offered`."""
    reasons = {}
    for index, block in enumerate(_blocks(model)):
        reasons[Unit("attn", index)] = "" if _has_attention(block) else "removed"
        reasons[Unit("act", index)] = _why_kept(block.mlp)
    indices = {kind: tuple(u.index for u, why in reasons.items() if u.kind == kind and not why) for kind in KINDS}
    return Offer(**indices, refused={str(unit): why for unit, why in reasons.items() if why})


def _has_attention(block: Any) -> bool:
    if isinstance(block, MlpBlock):
        return isinstance(block, FadingBlock)
    return not isinstance(block.attn, NoAttention)


def _why_kept(mlp: Any) -> str:
    """Say why an MLP's activation is no unit; nothing where two linear layers have only an activation between them."""
    name = type(mlp).__name__
    if isinstance(mlp, nn.Linear):
        return "removed"
    if isinstance(mlp, timm.layers.SwiGLU | timm.layers.GluMlp):
        return f"{name}: a gate between fc1 and fc2, so they are no one linear layer without it"
    if not isinstance(mlp, timm.layers.Mlp):
        return f"{name}: not known to be two linear layers with an activation between"
    if isinstance(mlp.act, nn.Identity):
        return "removed"
    if not isinstance(mlp.fc1, nn.Linear) or not isinstance(mlp.fc2, nn.Linear):
        return f"{name}: fc1 is a {type(mlp.fc1).__name__}, fc2 a {type(mlp.fc2).__name__}, not linear layers"
    if not isinstance(mlp.norm, nn.Identity):
        return f"{name}: a {type(mlp.norm).__name__} between fc1 and fc2, so they are no one linear layer without it"
    return ""


@contextmanager
def gates(model: nn.Module, attention: Attention) -> Iterator[dict[Unit, torch.Tensor]]:
    """Install one differentiable scalar per unit, 1 = as built, 0 = exactly what `remove` leaves.

    The model is put back as it was when the context ends.
    """
    device = next(model.parameters()).device
    installed = {unit: torch.ones((), device=device, requires_grad=True) for unit in units(model)}
    places = {unit: _place(model, unit, attention) for unit in installed}
    originals = {unit: getattr(owner, name) for unit, (owner, name) in places.items()}
    try:
        for unit, gate in installed.items():
            setattr(*places[unit], _gated(originals[unit], unit, gate, attention))
        yield installed
    finally:
        for unit, module in originals.items():
            setattr(*places[unit], module)


def _place(model: nn.Module, unit: Unit, attention: Attention) -> tuple[nn.Module, str]:
    """Return the module that holds what a gate stands around, and its name there."""
    blocks = _blocks(model)
    if unit.kind == "act":
        return blocks[unit.index].mlp, "act"
    return (blocks, str(unit.index)) if attention == "double" else (blocks[unit.index], "attn")


def _gated(module: nn.Module, unit: Unit, gate: torch.Tensor, attention: Attention) -> nn.Module:
    if unit.kind == "act":
        return GatedActivation(module, gate)
    return FadingBlock(module, gate) if attention == "double" else GatedAttention(module, gate, attention)


def fade(model: nn.Module, left: float, plan: PruningPlan) -> None:
    """Leave as much, in place, of the plan's attentions as `left` says, from 1, as built, to 0, what `double` leaves.

    The model keeps its weights and their names, for a training by and by to reach what `remove` leaves at once.
    """
    blocks = _blocks(model)
    for index in plan.attn:
        if isinstance(blocks[index], FadingBlock):
            blocks[index].gate = left
        else:
            blocks[index] = FadingBlock(blocks[index], left)


def remove(model: nn.Module, plan: PruningPlan, attention: Attention) -> nn.Module:
    """Remove the plan's units in place and return the model; removing in several steps gives the same model.

    What stays of a removed attention is for `attention` to say. With `zero` and `double` its norm, scale and drop-path
    go with it: they are of the branch. With `identity` they stay, around the norm: `x + drop_path1(ls1(norm1(x)))`.

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
        if attention == "identity":
            blocks[index].attn = NoAttention()
        else:
            blocks[index] = (MlpBlock if attention == "zero" else DoubleBlock)(blocks[index])
    return model


def merge(model: nn.Module) -> nn.Module:
    """Make the model, in place, as small and fast as what it computes in evaluation allows, and return it.

    An MLP without activation becomes one linear layer: `W = W2 @ W1` and `b = W2 @ b1 + b2`, formed in float64 and
    rounded once. The layer scale of an attention that is the identity goes into its norm's affine. Factors of 2 go into
    weights and norms, see `_fold_doubling`.
    """
    for block in _blocks(model):
        mlp = block.mlp
        if isinstance(mlp, timm.layers.Mlp) and isinstance(mlp.act, nn.Identity):
            block.mlp = _merged(mlp.fc1, mlp.fc2)
        if not isinstance(block, MlpBlock) and isinstance(block.attn, NoAttention):
            _fold_scale(block)
    _fold_doubling(model)
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


@torch.no_grad()
def _fold_scale(block: Any) -> None:
    """Leave a layer scale directly behind an affine norm out: `gamma * norm(x)` is a norm with other weights."""
    if _is_affine(block.norm1) and isinstance(block.ls1, timm.layers.LayerScale):
        for parameter in (block.norm1.weight, block.norm1.bias):
            parameter.mul_(block.ls1.gamma)
        block.ls1 = nn.Identity()


def _is_affine(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


@torch.no_grad()
def _fold_doubling(model: Any) -> None:
    """Leave out the factors of 2 of all `DoubleBlock`s, where that is exact; else the model stays as it is.

    From the first of them on, the tokens are then what they were, over a factor f, a power of 2. What every branch adds
    is divided by f, in its last weights; a layer norm of tokens over f is what it was if its epsilon is divided by f^2.
    Division by a power of 2 rounds nothing, so the logits stay the same, bit for bit in float32.
    """
    blocks, factor = _blocks(model), 1.0
    first = next((i for i, block in enumerate(blocks) if isinstance(block, DoubleBlock)), len(blocks))
    halves = [_halves(block) for block in blocks[first:]]
    # Between the blocks and a norm behind the pooling must be nothing but the pooling.
    last = model.fc_norm if isinstance(model.norm, nn.Identity) and model.attn_pool is None else model.norm
    norms = [*(norm for half in halves for norm, _ in half), last]
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or not all(w for half in halves for _, w in half):
        return
    for index, half in enumerate(halves, first):
        if isinstance(blocks[index], DoubleBlock):
            factor *= 2
            blocks[index] = MlpBlock(blocks[index])
        for norm, weights in half:
            norm.eps /= factor**2
            for weight in weights:
                weight.div_(factor)
    last.eps /= factor**2


def _halves(block: Any) -> list[tuple[Any, list[torch.Tensor]]]:
    """Return, for each half of a block, its norm and the weights that scale what it adds; none where not known."""
    halves = [(block.norm2, _scaling(block.mlp, block.ls2))]
    if not isinstance(block, MlpBlock):
        ours = isinstance(block.attn, NoAttention) and _is_affine(block.norm1)
        halves.insert(0, (block.norm1, _scaling(block.norm1 if ours else block.attn, block.ls1)))
    return halves


def _scaling(branch: Any, scale: nn.Module) -> list[torch.Tensor]:
    if isinstance(scale, timm.layers.LayerScale):
        return [scale.gamma]
    if isinstance(branch, timm.layers.Attention | timm.layers.Mlp):
        branch = branch.proj if isinstance(branch, timm.layers.Attention) else branch.fc2
    known = isinstance(branch, nn.Linear | nn.LayerNorm)
    return [weight for weight in (branch.weight, branch.bias) if weight is not None] if known else []
