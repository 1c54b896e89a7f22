"""What a model's forward pass is made of, found without knowing any model: its attentions, its MLPs, its blocks.

The model is run once, on the meta device where it can be, and what comes from the image is followed:

- A *softmax attention* is a softmax over products of two activations (queries and keys) that then weighs a third
  (values), all within one call of one module; or torch's fused function for it. It is attributed to the innermost
  module with weights that has not returned.
- A softmax that weighs values, but is not over products of queries and keys, is *another attention*.
- An *MLP* is an `nn.Linear`, one activation and an `nn.Linear`, with at most reshapes, slices and dropout between: no
  norm, no convolution, no product with a gate. An activation is a function, or a module, that maps every number for
  itself and is not linear.
- A *block* is a smallest module that holds both a softmax attention and an MLP. The model itself is none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum")
FUSED = ("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention")
ACTIVATIONS = (
    "gelu", "relu", "relu_", "relu6", "silu", "sigmoid", "tanh", "hardtanh", "hardswish", "mish", "elu", "selu", "celu",
    "leaky_relu", "softplus", "hardsigmoid", "square",
)  # fmt: skip
MOVES = (
    "reshape", "view", "permute", "transpose", "flatten", "unflatten", "contiguous", "to", "type_as", "float", "chunk",
    "split", "unbind", "__getitem__", "squeeze", "unsqueeze", "dropout", "dropout_", "clone", "expand", "roll",
    "narrow", "movedim", "swapaxes", "t", "__get__",
)  # fmt: skip
"""Functions that hand numbers on as they are, in another shape or order; in evaluation dropout does too."""


@dataclass
class Structure:
    """What was seen, by the names of `named_modules`."""

    attentions: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    mlps: list[tuple[str, str]] = field(default_factory=list)
    """The two linear layers of each."""

    def blocks(self) -> list[str]:
        """Return the blocks' names."""
        around = {holder for attention in self.attentions for holder in _holders(attention)}
        found = set()
        for first, second in self.mlps:
            common = [name for name in _holders(second) if _inside(first, name)]
            found |= {name for name in common if name in around and name == next(n for n in common if n in around)}
        return [name for name in sorted(found) if not any(_inside(other, name) for other in found - {name})]


def _holders(name: str) -> list[str]:
    """Return a module's own name and those of what it is in, innermost first, without the model itself."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1) if name]


def _inside(name: str, holder: str) -> bool:
    return name == holder or name.startswith(f"{holder}.")


def structure(model: nn.Module, image: torch.Tensor) -> Structure:
    """Run the model once, in evaluation mode, and return what was seen.

    Args:
        model: any model that takes one batch of images.
        image: shape (images, channels, height, width), on the model's device.
    """
    tracer = Tracer(model.eval(), image)
    with torch.no_grad(), tracer.hooks(), tracer:
        model(image)
    return tracer.seen


class Tracer(TorchFunctionMode):
    """Follows tensors through functions and modules."""

    def __init__(self, model: nn.Module, image: torch.Tensor) -> None:
        super().__init__()
        self.seen = Structure()
        self.names = {module: name for name, module in model.named_modules()}
        self.calls: list[tuple[nn.Module, object]] = []
        self.from_image = WeakTensorKeyDictionary()
        self.scores = WeakTensorKeyDictionary()
        """Made of products of queries and keys -> the call of a module in which that was."""
        self.weights = WeakTensorKeyDictionary()
        """Made of a softmax -> the call in which that was, and whether it was over scores."""
        self.linear = WeakTensorKeyDictionary()
        """What a linear layer gave -> its name, and whether an activation came since."""
        self.from_image[image] = True

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Be told of all calls of modules."""
        before = register_module_forward_pre_hook(lambda module, _: self.calls.append((module, object())))
        after = register_module_forward_hook(self._left, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = list(_tensors((args, kwargs)))
        if any(tensor in self.from_image for tensor in given):
            name = getattr(func, "__name__", "")
            for tensor in _tensors(result):
                self.from_image[tensor] = True
                self._follow_attention(name, given, tensor)
                self._follow_mlp(name, given, tensor)
        return result

    def _call(self) -> tuple[nn.Module, object]:
        """Return the innermost call of a module with weights."""
        weighted = (call for call in reversed(self.calls) if next(call[0].parameters(), None) is not None)
        return next(weighted, self.calls[0])

    def _open(self, call: object) -> bool:
        return any(token is call for _, token in self.calls)

    def _follow_attention(self, name: str, given: list[torch.Tensor], result: torch.Tensor) -> None:
        module, call = self._call()
        weights = [self.weights[t] for t in given if t in self.weights and self._open(self.weights[t][0])]
        scores = [self.scores[t] for t in given if t in self.scores and self._open(self.scores[t])]
        if name in FUSED:
            self._saw(self.seen.attentions, module)
        elif name in PRODUCTS and weights:
            self._saw(self.seen.attentions if weights[0][1] else self.seen.others, module)
        elif name in PRODUCTS and sum(t in self.from_image for t in given) >= 2:
            self.scores[result] = call
        elif name == "softmax":
            self.weights[result] = (scores[0] if scores else call, bool(scores))
        elif weights:
            self.weights[result] = weights[0]
        elif scores:
            self.scores[result] = scores[0]

    def _saw(self, where: list[str], module: nn.Module) -> None:
        name = self.names.get(module, "")
        if name not in where:
            where.append(name)

    def _follow_mlp(self, name: str, given: list[torch.Tensor], result: torch.Tensor) -> None:
        trail = self.linear.get(given[0])
        if trail is not None and name in MOVES:
            self.linear[result] = trail
        elif trail is not None and name in ACTIVATIONS and not trail[1] and len(given) == 1:
            self.linear[result] = (trail[0], True)
        else:
            # In place, the tensor is the one that was given.
            self.linear.pop(result, None)

    def _left(self, module: nn.Module, args: Any, result: Any) -> None:
        self.calls.pop()
        given, results = list(_tensors(args)), list(_tensors(result))
        if len(given) != 1 or len(results) != 1 or given[0] not in self.from_image:
            return
        trail = self.linear.get(given[0]) if given[0] is not results[0] else None
        if isinstance(module, nn.Linear):
            pair = (trail[0] if trail else "", self.names.get(module, ""))
            if trail and trail[1] and pair not in self.seen.mlps:
                self.seen.mlps.append(pair)
            self.linear[results[0]] = (pair[1], False)
        elif trail is not None and not trail[1] and _is_activation(module):
            self.linear[results[0]] = (trail[0], True)


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for item in nested:
            yield from _tensors(item)
    elif isinstance(nested, dict):
        yield from _tensors(tuple(nested.values()))


def _is_activation(module: nn.Module) -> bool:
    """Say whether a module with at most single numbers as weights maps every number for itself, and not linearly."""
    if any(weight.numel() > 1 for weight in module.parameters()):
        return False
    with torch._C.DisableTorchFunction(), torch.device("cpu"):
        here = copy.deepcopy(module).to_empty(device="cpu") if any(True for _ in module.parameters()) else module
        for weight in here.parameters():
            weight.data.fill_(0.7)
        numbers = torch.linspace(-3, 3, 16).reshape(1, 2, 8)
        changed = numbers.clone()
        changed[..., ::2] += 1
        try:
            first, second = here.forward(numbers.clone()), here.forward(changed.clone())
            middle = here.forward((numbers + changed) / 2)
        except (RuntimeError, ValueError, TypeError):
            return False
    if first.shape != numbers.shape or not torch.equal(first[..., 1::2], second[..., 1::2]):
        return False
    return not torch.allclose(middle, (first + second) / 2, atol=1e-6)
