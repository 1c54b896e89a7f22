"""Gated MLPs, `fc2(act(a(x)) * b(x))`, made plain, `fc2(act(fc1(x)))`: the gate is fitted away on data.

With a gate between its linear layers an MLP is not one linear layer without its activation. So fc1 becomes the gate's
half or the value's half, whichever fits better, and fc2, with a bias, is solved for by ridge regression on what the
gated MLP gives out: least squares on images, with no training. The MLPs are fitted from the input on, each on the
tokens that the plain ones before it leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from search_spaces.blocks import blocks_of
from search_spaces.mlps import GATED, class_name
from search_spaces.timm_compat import timm

RIDGE = 1e-4
"""Of the mean square of a hidden unit, added to every one's."""
HELD_OUT = 4
"""One batch in so many tells the error and is not fitted to."""


def gated_paths(model: nn.Module) -> list[str]:
    """Return the paths of the gated MLPs that can be made plain, in the model's order."""
    paths = [
        f"{path}.{branch.core}"
        for path, _, form in blocks_of(model)
        for branch in form.branches("mlp")
        if isinstance(branch.core, str)
    ]
    return [path for path in paths if GATED.get(class_name(model.get_submodule(path)))]


def make_plain(model: nn.Module) -> nn.Module:
    """Put plain MLPs with weights still to be read in the gated ones' places, and return the model."""
    for path in gated_paths(model):
        gated = model.get_submodule(path)
        _put(model, path, _plain(gated, _halves(gated)[0]))
    return model


def absorb(model: nn.Module, batches: Sequence[torch.Tensor]) -> dict[str, float]:
    """Make the model's gated MLPs plain, in place.

    Args:
        model: in evaluation mode.
        batches: images, each of shape (B, C, H, W), on the model's device; at least two.

    Returns:
        By path of the MLP the error of its output on images that it was not fitted to: root mean square, relative to
        that of the output.
    """
    errors = {}
    for path in gated_paths(model):
        gated = model.get_submodule(path)
        found = [_fit(model, gated, half, batches) for half in _halves(gated)]
        errors[path], plain = min(found, key=lambda each: each[0])
        _put(model, path, plain)
    return errors


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)


def _halves(gated: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Return weight and bias of the gate's half of the first linear layer, then of the value's."""
    if class_name(gated) == "timm.layers.mlp.SwiGLU":
        return [(layer.weight, layer.bias) for layer in (gated.fc1_g, gated.fc1_x)]
    weights = gated.fc1.weight.chunk(2)
    biases = gated.fc1.bias.chunk(2) if gated.fc1.bias is not None else (None, None)
    pairs = list(zip(weights, biases, strict=True))
    return pairs[::-1] if gated.gate_last else pairs


@torch.no_grad()
def _plain(gated: Any, half: tuple[torch.Tensor, torch.Tensor | None]) -> Any:
    """Return an MLP whose first linear layer is that half; its second has the gated one's weights as yet."""
    weight, bias = half
    device, dtype = weight.device, weight.dtype
    sizes = (weight.shape[1], weight.shape[0], gated.fc2.out_features)
    plain = timm.layers.Mlp(
        *sizes, act_layer=lambda: gated.act, bias=(bias is not None, True), device=device, dtype=dtype
    )
    plain.fc1.weight.copy_(weight)
    if bias is not None:
        plain.fc1.bias.copy_(bias)
    plain.fc2.weight.copy_(gated.fc2.weight)
    plain.fc2.bias.copy_(gated.fc2.bias if gated.fc2.bias is not None else torch.zeros_like(plain.fc2.bias))
    plain.drop1.p, plain.drop2.p = gated.drop1.p, gated.drop2.p
    return plain.train(gated.training)


@torch.no_grad()
def _fit(
    model: nn.Module, gated: Any, half: tuple[torch.Tensor, torch.Tensor | None], batches: Sequence[torch.Tensor]
) -> tuple[float, nn.Module]:
    """Return the plain MLP that is nearest to a gated one, and its error; float64 throughout."""
    plain = _plain(gated, half)
    size = plain.fc2.in_features + 1
    inner = torch.zeros(size, size, dtype=torch.float64, device=half[0].device)
    outer = torch.zeros(size, plain.fc2.out_features, dtype=torch.float64, device=half[0].device)
    for number, (tokens, wanted) in enumerate(_seen(model, gated, batches)):
        if number % HELD_OUT != HELD_OUT - 1 and number != len(batches) - 1:
            hidden = _hidden(plain, tokens)
            inner += hidden.T @ hidden
            outer += hidden.T @ wanted
    ridge = RIDGE * float(inner.diagonal()[:-1].mean()) * torch.eye(size, dtype=torch.float64, device=inner.device)
    ridge[-1, -1] = 0
    solved = torch.linalg.solve(inner + ridge, outer)
    plain.fc2.weight.copy_(solved[:-1].T)
    plain.fc2.bias.copy_(solved[-1])
    missed = total = 0.0
    for number, (tokens, wanted) in enumerate(_seen(model, gated, batches)):
        if number % HELD_OUT == HELD_OUT - 1 or number == len(batches) - 1:
            missed += float((_hidden(plain, tokens) @ solved - wanted).square().sum())
            total += float(wanted.square().sum())
    return (missed / total) ** 0.5, plain


def _hidden(plain: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return what the second linear layer sees, and a one for its bias; shape (tokens, hidden + 1)."""
    hidden = plain.act(plain.fc1(tokens)).double()
    return torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)


def _seen(
    model: nn.Module, gated: nn.Module, batches: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield what an MLP is given and gives out, batch by batch; shape (tokens, width), the second in float64."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = gated.register_forward_hook(lambda module, given, out: kept.append((given[0], out)))
    try:
        for pixels in batches:
            model(pixels)
            tokens, out = kept.pop()
            yield tokens.flatten(0, -2), out.flatten(0, -2).double()
    finally:
        hook.remove()
