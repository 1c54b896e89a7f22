"""The verbs of every family: `units`, `gates`, `remove`, `merge`, and `fade`, on the blocks that `blocks` describes.

Modifications: a block that loses an attention is replaced by what is left of it (`blocks.Left`), with the names of what
stays, so the state dict shrinks and nothing is renamed. An MLP that loses its activation gets an `nn.Identity` in its
place, and `merge` then makes one linear layer of its two. Nothing is copied: a model is changed in place.

Method: Depth pruning of attention and activation layers (HetDPT, "Rethinking Depth Pruning for ViTs: A
Heterogeneity-Aware Perspective", PMLR v306). Its code adds a GELU on the output of a block that lost both units; here
nothing is added. `double` with its decay: NOSE ("MLP can be a good transformer learner", CVPR 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from search_spaces import Offer, UnsupportedModel
from search_spaces.blocks import Form, Left, blocks_of, left_of, part, take_attention
from search_spaces.doubling import fold_doubling, fold_scale
from search_spaces.mlps import MLPS, class_name, merged, why_kept
from search_spaces.plan import KINDS, Attention, PruningPlan, Unit


class GatedActivation(nn.Module):
    """A blend of an activation (gate 1) and the identity (gate 0)."""

    def __init__(self, act: nn.Module, gate: torch.Tensor) -> None:
        super().__init__()
        self.act, self.gate = act, gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.lerp(x, self.act(x), self.gate.to(x.dtype))


@dataclass(frozen=True)
class _Place:
    """Where a unit is: its block's path and form, and which of the block's branches of its kind it is in."""

    path: str
    form: Form
    number: int


def _places(model: nn.Module) -> dict[Unit, _Place]:
    """Number all attentions and MLPs of a model, as units or not; removal changes no number."""
    places: dict[Unit, _Place] = {}
    for kind, branch in (("attn", "attn"), ("act", "mlp")):
        found = [
            _Place(path, form, number)
            for path, _, form in blocks_of(model)
            for number in range(len(form.branches(branch)))
        ]
        places |= {Unit(kind, index): place for index, place in enumerate(found)}
    return places


def check(model: object) -> None:
    """Make sure that some block of the model is described.

    Raises:
        UnsupportedModel: none is.
    """
    if isinstance(model, nn.Module) and next(blocks_of(model), None):
        return
    kinds = {type(module).__name__ for module in model.modules()} if isinstance(model, nn.Module) else set()
    seen = sorted(kind for kind in kinds if any(word in kind.lower() for word in ("block", "attention", "layer_")))
    has = f"; it has {', '.join(seen)}" if seen else ""
    raise UnsupportedModel(f"no family describes the blocks of {type(model).__name__}{has}")


def offered(model: nn.Module) -> Offer:
    """Say what can be removed, and why the rest cannot; see `search_spaces.offered`."""
    reasons = {unit: _why_not(model, unit, place) for unit, place in _places(model).items()}
    attn, act = (tuple(u.index for u, why in reasons.items() if u.kind == kind and not why) for kind in KINDS)
    return Offer(attn, act, {str(unit): why for unit, why in reasons.items() if why})


def _why_not(model: nn.Module, unit: Unit, place: _Place) -> str:
    block = model.get_submodule(place.path)
    if unit.kind == "act":
        mlp = place.form.branches("mlp")[place.number].core
        shares = f"{type(block).__name__}: the MLP shares its linear layers with the attention"
        return shares if callable(mlp) else why_kept(part(block, mlp))
    if isinstance(block, Left) and place.number in block.removed:
        return "removed"
    return place.form.attn_stays(block)


def _mlp_path(place: _Place) -> str:
    """Return the path of an MLP in its block."""
    return str(place.form.branches("mlp")[place.number].core)


def _act_place(model: nn.Module, place: _Place) -> tuple[Any, str]:
    """Return the MLP of a unit, and its activation's name there."""
    mlp = part(model.get_submodule(place.path), _mlp_path(place))
    return mlp, MLPS[class_name(mlp)].act


def units(model: nn.Module) -> tuple[Unit, ...]:
    """Return the units that can still be removed, attentions first, in the model's order."""
    found = offered(model)
    return (*(Unit("attn", i) for i in found.attn), *(Unit("act", i) for i in found.act))


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)


@contextmanager
def gates(model: nn.Module, attention: Attention) -> Iterator[dict[Unit, torch.Tensor]]:
    """Install one differentiable scalar per unit, 1 = as built, 0 = exactly what `remove` leaves.

    The model is put back as it was when the context ends.
    """
    device = next(model.parameters()).device
    installed = {unit: torch.ones((), device=device, requires_grad=True) for unit in units(model)}
    places = _places(model)
    acts = {unit: _act_place(model, places[unit]) for unit in installed if unit.kind == "act"}
    activations = {unit: getattr(*place) for unit, place in acts.items()}
    attns = [unit for unit in installed if unit.kind == "attn"]
    blocks = {places[unit].path: model.get_submodule(places[unit].path) for unit in attns}
    try:
        for unit, (mlp, name) in acts.items():
            setattr(mlp, name, GatedActivation(activations[unit], installed[unit]))
        for unit in attns:
            _left(model, places[unit]).gates[places[unit].number] = (installed[unit], attention)
        yield installed
    finally:
        for unit, (mlp, name) in acts.items():
            setattr(mlp, name, activations[unit].train(mlp.training))
        for path, block in blocks.items():
            block.training = model.get_submodule(path).training
            _set(model, path, block)


def _left(model: nn.Module, place: _Place) -> Left:
    """Put what is left of a block in the block's place, and return it."""
    left = left_of(model.get_submodule(place.path), place.form)
    _set(model, place.path, left)
    return left


def fade(model: nn.Module, left: float, plan: PruningPlan) -> None:
    """Leave as much, in place, of the plan's attentions as `left` says, from 1, as built, to 0, what `double` leaves.

    The model keeps its weights and their names, for a training by and by to reach what `remove` leaves at once. The
    attentions are computed even where nothing of them is left.
    """
    places = _places(model)
    for index in plan.attn:
        place = places[Unit("attn", index)]
        _left(model, place).gates[place.number] = (left, "double")


def remove(model: nn.Module, plan: PruningPlan, attention: Attention) -> nn.Module:
    """Remove the plan's units in place and return the model; removing in several steps gives the same model.

    What stays of a removed attention is for `attention` to say. With `zero` and `double` its norm, scale and drop-path
    go with it: they are of the branch. With `identity` they stay, as `x + drop_path1(ls1(norm1(x)))` in a pre-norm
    block and `x + drop_path1(norm1(x))` in a post-norm one.

    Raises:
        UnsupportedModel: a unit of the plan is not there to be removed.
    """
    missing = set(plan.units) - set(units(model))
    if missing:
        names = " ".join(str(unit) for unit in sorted(missing))
        raise UnsupportedModel(f"the model has no removable {names}")
    places = _places(model)
    for index in plan.act:
        mlp, name = _act_place(model, places[Unit("act", index)])
        setattr(mlp, name, nn.Identity())
    for index in plan.attn:
        place = places[Unit("attn", index)]
        take_attention(_left(model, place), place.number, attention)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Make the model, in place, as small and fast as what it computes in evaluation allows, and return it.

    An MLP without activation becomes one linear layer: `W = W2 @ W1` and `b = W2 @ b1 + b2`, formed in float64 and
    rounded once. The scale of an attention that is the identity goes into its norm's affine. Factors of 2 go into
    weights and norms where that is exact, see `doubling`.
    """
    for path, block, form in blocks_of(model):
        for branch in form.branches("mlp"):
            if isinstance(branch.core, str):
                place = f"{path}.{branch.core}"
                _set(model, place, merged(model.get_submodule(place)))
        if isinstance(block, Left):
            fold_scale(block)
            if form.shrink and len(block.removed) == len(form.branches("attn")):
                form.shrink(block)
    fold_doubling(model)
    return model
