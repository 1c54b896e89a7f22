"""Scales and factors of 2 that removed attentions leave, put into weights and norms where that is exact."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from search_spaces import FAMILIES
from search_spaces.blocks import Branch, Form, Left, blocks_of, part
from search_spaces.timm_compat import timm


@torch.no_grad()
def fold_scale(left: Left) -> None:
    """Leave a scale directly behind an affine norm out: `gamma * norm(x)` is a norm with other weights."""
    for number, branch in enumerate(left.form.branches("attn")):
        if left.removed.get(number) != "identity" or len(branch.pre) != 1 or not branch.post:
            continue
        if {branch.pre[0], branch.post[0]} & set(_shared(left, branch)):
            continue
        norm, scale = part(left, branch.pre[0]), part(left, branch.post[0])
        gamma = scale.gamma if isinstance(scale, timm.layers.LayerScale) else scale
        if _is_affine(norm) and isinstance(gamma, torch.Tensor):
            for parameter in (norm.weight, norm.bias):
                parameter.mul_(gamma)
            owner, _, name = branch.post[0].rpartition(".")
            setattr(left.get_submodule(owner), name, None if isinstance(scale, torch.Tensor) else nn.Identity())


def _shared(left: Left, branch: Branch) -> list[str]:
    """Return the modules around the cores of a block's other branches."""
    others = [other for kind in ("attn", "mlp", "other") for other in left.form.branches(kind) if other is not branch]
    return [path for other in others for path in (*other.pre, *other.post)]


def _is_affine(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


@torch.no_grad()
def fold_doubling(model: Any) -> None:
    """Leave out the factors of 2 that `double` leaves, where that is exact; else the model stays as it is.

    From the first of them on, the tokens are then what they were, over a factor f, a power of 2. What every branch adds
    is divided by f, in its last weights; a layer norm of tokens over f is what it was if its epsilon is divided by f^2.
    Division by a power of 2 rounds nothing, so the logits stay the same, bit for bit in float32. It takes a family that
    says which norm reads the tokens behind the last block.
    """
    blocks = [(block, form) for _, block, form in blocks_of(model)]
    first = next((i for i, (block, _) in enumerate(blocks) if _doublings(block)), len(blocks))
    if first == len(blocks):
        return
    last = _reader(model, [block for block, _ in blocks])
    halves = [half for block, form in blocks[first:] for half in _halves(block, form)]
    norms = [*(norm for norm, _ in halves if norm is not DOUBLED), last]
    known = all(weights for norm, weights in halves if norm is not DOUBLED)
    if not known or not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        return
    factor = 1.0
    for norm, weights in halves:
        if norm is DOUBLED:
            factor *= 2
            continue
        norm.eps /= factor**2
        for weight in weights:
            weight.div_(factor)
    last.eps /= factor**2
    for block, _ in blocks:
        if isinstance(block, Left):
            block.removed |= dict.fromkeys(_doublings(block), "zero")


DOUBLED = "doubled"


def _doublings(block: nn.Module) -> list[int]:
    return [n for n, stays in block.removed.items() if stays == "double"] if isinstance(block, Left) else []


def _reader(model: Any, blocks: list[nn.Module]) -> Any:
    """Return the norm that alone reads the tokens behind the last block, as the model's family says; else None."""
    for base in type(model).__mro__:
        if base.__module__ in FAMILIES:
            readers = getattr(importlib.import_module(FAMILIES[base.__module__]), "READERS", {})
            if base.__name__ in readers:
                return readers[base.__name__](model) if list(model.blocks) == blocks else None
    return None


def _halves(block: Any, form: Form) -> list[tuple[Any, list[torch.Tensor]]]:
    """Return, for each branch of a block, its norm and the weights that scale what it adds; none where not known."""
    halves: list[tuple[Any, list[torch.Tensor]]] = []
    number = 0
    for step in form.steps:
        if not isinstance(step, Branch):
            return [(None, [])]
        stays = block.removed.get(number) if step.kind == "attn" and isinstance(block, Left) else None
        number += step.kind == "attn"
        if stays == "double":
            halves.append((DOUBLED, []))
        elif stays != "zero":
            halves.append(_half(block, step, stays == "identity"))
    return halves


def _half(block: Any, branch: Branch, is_identity: bool) -> tuple[Any, list[torch.Tensor]]:
    if len(branch.pre) != 1 or callable(branch.core) or branch.skip:
        return None, []
    norm = part(block, branch.pre[0])
    last = norm if is_identity else part(block, branch.core)
    if is_identity and not _is_affine(norm):
        return norm, []
    return norm, _scaling(last, [part(block, path) for path in branch.post])


def _scaling(branch: Any, post: list[Any]) -> list[torch.Tensor]:
    """Return the weights that what a branch adds is proportional to."""
    for last in reversed(post):
        if isinstance(last, timm.layers.LayerScale):
            return [last.gamma]
        if isinstance(last, torch.Tensor):
            return [last]
        if last is not None and not isinstance(last, nn.Identity | timm.layers.DropPath):
            return []
    if isinstance(branch, timm.layers.Attention | timm.layers.Mlp):
        branch = branch.proj if isinstance(branch, timm.layers.Attention) else branch.fc2
    known = isinstance(branch, nn.Linear | nn.LayerNorm)
    return [weight for weight in (branch.weight, branch.bias) if weight is not None] if known else []
