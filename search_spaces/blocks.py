"""How a transformer block is described, and what is left of one that loses attentions.

Nearly every block is the same sentence, said once for the attention and once for the MLP: `x + post(core(pre(x)))`. The
norm is in `pre` or in `post`, layer scale and drop path are in `post`, and `core` is the attention or the MLP. A `Form`
says which attributes of a block play these parts; a family is a table of forms. `Left` runs a form without what was
removed from it, so all that can be done to a block is written once, here.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from search_spaces import FAMILIES
from search_spaces.plan import Attention


@dataclass(frozen=True)
class Branch:
    """One addend of a block: `post(core(pre(x)))`.

    Attributes:
        core: the attribute that does the work, a module or a method; or a function of the block and the tokens.
        pre: modules before it, in order; paths from the block.
        post: modules after it, in order; a parameter is a scale, and None is nothing.
        takes: those of the block's arguments, by name, that the core is given too.
        parts: modules and buffers that belong to the core, by name; the core itself where it is a module.
        kind: `attn`, `mlp`, or `other` for what always stays.
        skip: a module that the tokens pass before the branch is added to them.
    """

    core: str | Callable[..., torch.Tensor]
    pre: tuple[str, ...] = ()
    post: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    kind: str = "other"
    skip: str = ""

    @property
    def own(self) -> tuple[str, ...]:
        """What belongs to the core."""
        return self.parts or ((self.core,) if isinstance(self.core, str) else ())


Step = Branch | tuple[Branch, ...] | Callable[..., torch.Tensor]
"""What a block does next: add a branch, or branches of the same tokens, or replace the tokens by a function of them."""


def always(block: nn.Module) -> str:
    """Refuse no block's attentions."""
    return ""


@dataclass(frozen=True)
class Form:
    """How the blocks of a class compute.

    Attributes:
        steps: what they do, in order; where `attn_stays` always has a reason, only the MLPs matter.
        takes: names of the arguments of the class's `forward` after the tokens, in order.
        attn_stays: says of a block why its attentions cannot be removed; the empty text where they can.
        returns: makes what the block returns of the tokens and its arguments.
        shrink: at the merge, drops what a block without attentions does not use of the modules that it keeps.
        numbered: the steps, each branch with its number among the block's attentions; -1 for others.
    """

    steps: tuple[Step, ...]
    takes: tuple[str, ...] = ()
    attn_stays: Callable[[Any], str] = always
    returns: Callable[..., Any] | None = None
    shrink: Callable[[Any], None] | None = None
    numbered: list[list[tuple[Branch, int]] | Callable[..., torch.Tensor]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        # Here, and no cached property: torch.compile breaks a block in pieces at that one's lock.
        numbers = itertools.count()
        numbered = [
            step
            if callable(step)
            else [(branch, next(numbers) if branch.kind == "attn" else -1) for branch in _together(step)]
            for step in self.steps
        ]
        object.__setattr__(self, "numbered", numbered)

    def branches(self, kind: str) -> list[Branch]:
        """Return the branches of a kind, in order."""
        flat = [branch for step in self.steps if not callable(step) for branch in _together(step)]
        return [branch for branch in flat if branch.kind == kind]


def _together(step: Branch | tuple[Branch, ...]) -> tuple[Branch, ...]:
    return step if isinstance(step, tuple) else (step,)


def pre_norm(
    *takes: str,
    attn: str | Callable[..., torch.Tensor] = "attn",
    parts: tuple[str, ...] = (),
    scales: tuple[str, str] | None = None,
    drops: tuple[str, str] = ("drop_path1", "drop_path2"),
    attn_stays: Callable[[Any], str] = always,
    mlp_takes: tuple[str, ...] = (),
) -> Form:
    """Return the form `x + drop1(scale1(attn(norm1(x), *takes)))`, then the same with `norm2` and `mlp`."""
    first, second = ((scales[0],), (scales[1],)) if scales else ((), ())
    steps = (
        Branch(attn, ("norm1",), (*first, drops[0]), takes, parts, "attn"),
        Branch("mlp", ("norm2",), (*second, drops[1]), mlp_takes, kind="mlp"),
    )
    return Form(steps, takes, attn_stays)


def post_norm(*takes: str, attn: str = "attn", parts: tuple[str, ...] = (), last: tuple[Step, ...] = ()) -> Form:
    """Return the form `x + drop_path1(norm1(attn(x, *takes)))`, then the same with `mlp` and `norm2`, then `last`."""
    steps = (
        Branch(attn, (), ("norm1", "drop_path1"), takes, parts, "attn"),
        Branch("mlp", (), ("norm2", "drop_path2"), kind="mlp"),
    )
    return Form((*steps, *last), takes)


def mlp_only(why: str, *mlps: str) -> Form:
    """Return the form of blocks whose attentions stay, for the reason given, and whose MLPs are at those paths."""
    return Form((Branch("attn", kind="attn"), *(Branch(mlp, kind="mlp") for mlp in mlps)), attn_stays=lambda _: why)


def form_of(block: nn.Module) -> Form | None:
    """Return the form of a block's class; None for what no family describes.

    A subclass has the form of its base only while it computes the same.
    """
    if isinstance(block, Left):
        return block.form
    cls: Any = type(block)
    for base in cls.__mro__:
        if base.__module__ in FAMILIES and base.forward is cls.forward:
            forms: dict[str, Form] = importlib.import_module(FAMILIES[base.__module__]).FORMS
            if base.__name__ in forms:
                return forms[base.__name__]
    return None


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Form]]:
    """Yield the path, the module and the form of every block that a family describes, in the model's order."""
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        form = form_of(module)
        if form is not None:
            yield path, module, form
        else:
            inner = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
            waiting += reversed(inner)


class Left(nn.Module):
    """What is left of a block, or what a block is while its attentions have gates; made by `left_of`.

    Names and order of modules and weights are the block's.

    Attributes:
        form: how the block computes.
        removed: by number of the attention in the block, what stays of those that are removed.
        gates: by number of the attention, a gate between as built (1) and what is said to stay of it (0).
    """

    form: Form
    removed: dict[int, Attention]
    gates: dict[int, tuple[torch.Tensor | float, Attention]]

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.form.takes, args, strict=False)) | kwargs
        for step in self.form.numbered:
            if callable(step):
                x = step(self, x, **given)
                continue
            added = x
            for branch, number in step:
                added = part(self, branch.skip)(added) if branch.skip else added
                what = self._addend(branch, number, x, given)
                added = added if what is None else added + what
            x = added
        return self.form.returns(x, **given) if self.form.returns else x

    forward = _forward  # it stands for any block, so it takes whatever that one takes

    def _addend(self, branch: Branch, number: int, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor | None:
        if number < 0:
            return self._after(branch, self._core(branch, self._before(branch, x), given))
        if number in self.removed:
            stays = self.removed[number]
            if stays == "zero":
                return None
            return x if stays == "double" else self._after(branch, self._before(branch, x))
        if number not in self.gates:
            return self._after(branch, self._core(branch, self._before(branch, x), given))
        gate, stays = self.gates[number]
        before = self._before(branch, x)
        there = self._core(branch, before, given)
        if stays == "identity":
            return self._after(branch, before + gate * (there - before))
        added = gate * self._after(branch, there)
        return added if stays == "zero" else (1 - gate) * x + added

    def _before(self, branch: Branch, x: torch.Tensor) -> torch.Tensor:
        for path in branch.pre:
            x = part(self, path)(x)
        return x

    def _core(self, branch: Branch, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        taken = {name: given[name] for name in branch.takes if name in given}
        return branch.core(self, x, **taken) if callable(branch.core) else part(self, branch.core)(x, **taken)

    def _after(self, branch: Branch, x: torch.Tensor) -> torch.Tensor:
        for path in branch.post:
            last = part(self, path)
            # Identities are many, and to call a module takes time.
            if last is not None and type(last) is not nn.Identity:
                x = last * x if isinstance(last, torch.Tensor) else last(x)
        return x


def part(block: Any, path: str) -> Any:
    """Return what a block has at a dotted path."""
    if "." not in path:
        return getattr(block, path)
    return functools.reduce(getattr, path.split("."), block)


_CLASSES: dict[type[nn.Module], type[Left]] = {}


def _left_class(cls: type[nn.Module]) -> type[Left]:
    """Return a class that has a block's methods and computes as `Left` does."""
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Left{cls.__name__}", (Left, cls), {})
    return _CLASSES[cls]


def left_of(block: nn.Module, form: Form) -> Left:
    """Return a module that is put in a block's place; it has the block's own modules and weights, not copies."""
    cls = type(block) if isinstance(block, Left) else _left_class(type(block))
    left: Left = cls.__new__(cls)
    left.__dict__.update(block.__dict__)
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        left.__dict__[name] = block.__dict__[name].copy()
    left.form = form
    left.removed = dict(block.removed) if isinstance(block, Left) else {}
    left.gates = dict(block.gates) if isinstance(block, Left) else {}
    return left


def take_attention(left: Left, number: int, attention: Attention) -> None:
    """Remove an attention from what is left of a block, with all that only it needs."""
    left.removed[number] = attention
    left.gates.pop(number, None)
    branch = left.form.branches("attn")[number]
    gone = set(branch.own) if attention == "identity" else {*branch.own, *branch.pre, *branch.post}
    for path in sorted(gone - set(_needed(left))):
        _delete(left, path)


def _needed(left: Left) -> Iterator[str]:
    """Yield the paths of all that the branches that stay need."""
    for kind in ("mlp", "other"):
        for branch in left.form.branches(kind):
            yield from (*branch.own, *branch.pre, *branch.post)
    for number, branch in enumerate(left.form.branches("attn")):
        if number not in left.removed:
            yield from branch.own
        if left.removed.get(number, "identity") == "identity":
            yield from (*branch.pre, *branch.post)


def _delete(left: nn.Module, path: str) -> None:
    owner, _, name = path.rpartition(".")
    place = left.get_submodule(owner)
    if name in place._modules or name in place._parameters or name in place._buffers:
        delattr(place, name)
