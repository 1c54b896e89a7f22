"""MLPs whose two linear layers become one when the activation between them goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Mlp:
    """How the MLPs of a class compute: `second(act(first(x)))`, in evaluation.

    Attributes:
        first, act, second: names of the parts.
        between: what must be the identity for the linear layers to meet.
        whole: the linear layers are all there is, so one linear layer can stand for the MLP; else it stands for the
            second, and nothing for the first.
    """

    first: str = "fc1"
    act: str = "act"
    second: str = "fc2"
    between: tuple[str, ...] = ()
    whole: bool = True


MLPS = {
    "timm.layers.mlp.Mlp": Mlp(between=("norm",)),
    "timm.models.tiny_vit.NormMlp": Mlp(whole=False),
}
"""By full class name the MLPs that are two linear layers with an activation between."""
GATED = {
    "timm.layers.mlp.GluMlp": "; --gated absorb fits it away",
    "timm.layers.mlp.SwiGLU": "; --gated absorb fits it away",
    "timm.models.vitamin.GeGluMlp": "",
    "timm.models.gemma4_vit.Gemma4GatedMlp": "",
}
"""Classes of MLPs with a gate, `fc2(act(a(x)) * b(x))`, and what can be done about it, see `gated`."""


def class_name(module: object) -> str:
    """Return a class's full name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def why_kept(mlp: Any) -> str:
    """Say why an MLP's activation cannot be removed; nothing where two linear layers have only it between them."""
    name, known = type(mlp).__name__, MLPS.get(class_name(mlp))
    if isinstance(mlp, nn.Linear):
        return "removed"
    if class_name(mlp) in GATED:
        return f"{name}: a gate between the linear layers, so they are not one without it{GATED[class_name(mlp)]}"
    if known is None:
        return f"{name}: not known to be two linear layers with an activation between"
    first, second = getattr(mlp, known.first), getattr(mlp, known.second)
    if isinstance(getattr(mlp, known.act), nn.Identity):
        return "removed"
    if type(first) is not nn.Linear or type(second) is not nn.Linear:
        return f"{name}: {known.first} is a {type(first).__name__}, {known.second} a {type(second).__name__}"
    for part in known.between:
        if not isinstance(getattr(mlp, part), nn.Identity):
            kind = type(getattr(mlp, part)).__name__
            return f"{name}: a {kind} between the linear layers, so that without an activation they are not one"
    return ""


def merged(mlp: Any) -> nn.Module:
    """Return what an MLP is in evaluation: where its activation was removed, one linear layer less."""
    known = MLPS.get(class_name(mlp))
    if known is None or not all(isinstance(getattr(mlp, name), nn.Identity) for name in (known.act, *known.between)):
        return mlp
    first, second = getattr(mlp, known.first), getattr(mlp, known.second)
    if not isinstance(first, nn.Linear):
        return mlp  # it was merged before
    one = _product(first, second)
    if known.whole:
        return one
    setattr(mlp, known.first, nn.Identity())
    setattr(mlp, known.second, one)
    return mlp


@torch.no_grad()
def _product(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """Return `W = W2 @ W1`, `b = W2 @ b1 + b2`, formed in float64 and rounded once."""
    device, dtype = first.weight.device, first.weight.dtype
    product = nn.Linear(first.in_features, second.out_features, device=device, dtype=dtype)
    # On the CPU: not every accelerator multiplies float64. Weights on `meta` are none, and stay there.
    host = device if device.type == "meta" else torch.device("cpu")
    w1, w2 = first.weight.to(host, torch.float64), second.weight.to(host, torch.float64)
    b1 = first.bias.to(host, torch.float64) if first.bias is not None else w1.new_zeros(len(w1))
    b2 = second.bias.to(host, torch.float64) if second.bias is not None else w2.new_zeros(len(w2))
    product.weight.copy_(w2 @ w1)
    product.bias.copy_(w2 @ b1 + b2)
    product.weight.requires_grad_(second.weight.requires_grad)
    product.bias.requires_grad_(second.weight.requires_grad)
    return product
