"""What a training step asks of a model: mixed images and their targets, the teacher's opinion, the loss.

Shapes: B images of a worker's piece of a batch, K classes; logits (B, K), labels (B,), soft targets (B, K).
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from search_spaces.timm_compat import timm
from trainables.devices import autocast
from trainables.settings import Recipe


class Objective:
    """A recipe's targets and losses."""

    def __init__(self, recipe: Recipe, classes: int, teacher: nn.Module | None) -> None:
        self._recipe, self._classes, self._teacher = recipe, classes, teacher
        self._mixup = _mixup(recipe, classes)

    def targets(self, pixels: torch.Tensor, labels: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and soft targets; where images are mixed, each with its neighbour, by what follows from `key`.

        The images may come in another order. All pieces of a batch are given the same key, and so mixed alike.
        """
        if self._mixup is None:
            smoothing = self._recipe.label_smoothing
            return pixels, timm.data.mixup.mixup_target(labels, self._classes, smoothing=smoothing)
        # timm mixes the first with the last, and so on inwards: fold the piece so that neighbours meet.
        folded = torch.arange(len(labels), device=labels.device).view(-1, 2)
        folded = torch.cat([folded[:, 0], folded[:, 1].flip(0)])
        np.random.seed(key % 2**32)
        mixed, targets = self._mixup(pixels[folded], labels[folded])
        return mixed, targets

    def taught(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """Return the teacher's logits, shape (B, K), where there is one."""
        if self._teacher is None or self._recipe.distillation == "none":
            return None
        with torch.no_grad(), autocast(pixels.device, self._recipe.amp):
            return cast(torch.Tensor, self._teacher(pixels).float())

    def loss(
        self, model: nn.Module, pixels: torch.Tensor, targets: torch.Tensor, taught: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the mean loss over the images, with the teacher's part where it has said something."""
        with autocast(pixels.device, self._recipe.amp):
            logits = model(pixels).float()
            loss = F.cross_entropy(logits, targets)
            if taught is None:
                return loss
            alpha = self._recipe.distillation_alpha
            return (1 - alpha) * loss + alpha * distillation_loss(logits, taught, self._recipe)


def _mixup(recipe: Recipe, classes: int) -> Any:
    if not recipe.mixup and not recipe.cutmix:
        return None
    return timm.data.Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        label_smoothing=recipe.label_smoothing,
        num_classes=classes,
    )


def distillation_loss(logits: torch.Tensor, taught: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the loss of `logits` against the teacher's, both (B, K).

    `soft` is the Kullback-Leibler divergence at the recipe's temperature, times its square (Hinton, Vinyals and Dean
    2015, section 2.1); `hard` the cross entropy with the teacher's choices (Touvron et al. 2021, DeiT, equation 3).
    """
    if recipe.distillation == "hard":
        return F.cross_entropy(logits, taught.argmax(dim=1))
    t = recipe.temperature
    student, teacher = F.log_softmax(logits / t, dim=1), F.log_softmax(taught / t, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * t * t
