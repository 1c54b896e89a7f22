"""What every stage on a worker starts from: the dense model, its view of the images, and the device."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import cast

import safetensors.torch
import torch

from search_spaces import family_of
from search_spaces.plan import PruningPlan
from search_spaces.timm_compat import timm
from trainables.data import ImageSet, View, load_images
from trainables.dense import build_model
from trainables.devices import torch_device
from trainables.locations import read_bytes
from trainables.splits import Indices
from trainables.tables import BadData
from trainables.tasks import Task

Fade = Callable[[torch.nn.Module, float], None]
"""Takes a model and what is to be left of its fading attentions, from 1 down to 0."""
DENSE = PruningPlan()


@dataclass
class Workspace:
    """The dense model and its images, loaded once per process and shared by all that runs there."""

    task: Task
    drop_path: float = 0.0
    _sets: dict[tuple[str, int, bool, bool], ImageSet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(max(1, self.task.threads))

    @cached_property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch_device(self.task.device)

    @cached_property
    def dense(self) -> torch.nn.Module:
        """The dense model on the CPU; never trained or pruned in place."""
        return build_model(self.task.model, seed=self.task.seed, drop_path=self.drop_path)

    @cached_property
    def view(self) -> View:
        """How the model wants its images."""
        return View.of(self.dense, self.task.data)

    def pruned(self, plan: PruningPlan, start: str = "") -> torch.nn.Module:
        """Return a copy of the dense model without the plan's units, not merged.

        Args:
            plan: what is removed.
            start: place or URI of other weights of the dense model, such as the probe's; empty for its own.
        """
        model = copy.deepcopy(self.dense)
        if start:
            model.load_state_dict(safetensors.torch.load(read_bytes(start)))
        pruned: torch.nn.Module = family_of(model).remove(model, plan, self.task.attention)
        return pruned

    def to_train(
        self, plan: PruningPlan, start: str = "", start_plan: PruningPlan = DENSE
    ) -> tuple[torch.nn.Module, Fade | None]:
        """Return the model that a training of a plan begins with, and what lets attentions fade out of it.

        Where removed attentions leave `double`, those that `start_plan` has not fade; else the model is as `pruned`
        returns it, and nothing fades.

        Args:
            plan: what is removed.
            start: as in `pruned`.
            start_plan: what the weights of `start` were trained without already.
        """
        fading = PruningPlan(tuple(set(plan.attn) - set(start_plan.attn)))
        if self.task.attention != "double" or not fading.attn:
            return self.pruned(plan, start), None
        model = self.pruned(PruningPlan.of(set(plan.units) - set(fading.units)), start)
        fade = partial(family_of(model).fade, plan=fading)
        fade(model, left=1.0)
        return model, fade

    def weights(self, trained: torch.nn.Module, plan: PruningPlan) -> dict[str, torch.Tensor]:
        """Return the weights of a trained model that are in one without the plan's units, on the CPU."""
        own = trained.state_dict()
        return {name: own[name].contiguous().cpu() for name in self.pruned(plan).state_dict()}

    def images(
        self,
        split: str,
        limit: int = 0,
        *,
        may_read_test: bool = False,
        streams: Callable[[bool], bool] | None = None,
    ) -> ImageSet:
        """Return a split's images, or a fixed class-balanced subset of `limit` of them; see `load_images`.

        Raises:
            BadData: a label is not one of the model's classes, or the data cannot be used.
        """
        key = (split, limit, may_read_test, streams is not None)
        if key not in self._sets:
            images = load_images(
                self.task.data, split, self.view, self.task.seed, limit=limit, may_read_test=may_read_test,
                streams=streams,
            )  # fmt: skip
            self.check_labels(images.labels, split)
            self._sets[key] = images
        return self._sets[key]

    def check_labels(self, labels: Indices, split: str) -> None:
        """Raise BadData where a label is not one of the model's classes."""
        classes, low, high = cast(int, self.dense.num_classes), int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise BadData(
                f"{split} has label {low if low < 0 else high}, but the model has {classes} classes (0 to "
                f"{classes - 1}): set model.kwargs.num_classes, or correct the labels"
            )


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "timm": timm.__version__}
