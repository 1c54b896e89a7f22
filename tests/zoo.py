"""What a member of a family is for the tests, and its layers left out by hooks, with none of our verbs."""

import re
from contextlib import ExitStack
from dataclasses import dataclass
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
