"""The only training loop and the only evaluation loop.

Shapes: B images a step, K classes; logits (B, K), labels (B,), soft targets (B, K).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from search_spaces.timm_compat import timm
from trainables.data import ImageSet
from trainables.devices import DEVICES, autocast, synchronise
from trainables.settings import Recipe
from trainables.splits import Indices

Module = nn.Module

FADING = 0.7
"""Share of a training's steps over which attentions fade; in the rest the model trains as it will be."""


class Diverged(ArithmeticError):
    """The training loss is not a finite number."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch did.

    Attributes:
        number: counted from 1.
        loss: mean training loss.
        images: images trained on by this worker.
        seconds: wall-clock seconds of this worker.
    """

    number: int
    loss: float
    images: int
    seconds: float


class Training:
    """A model, the images it learns from, and all that changes while it does; one call of `run_epoch` at a time.

    Everything random is seeded by (seed, epoch, rank), so that a training that goes on from `state_dict` after any
    epoch does what the uninterrupted one does.
    """

    def __init__(
        self,
        model: Module,
        images: ImageSet,
        recipe: Recipe,
        *,
        device: torch.device,
        seed: int,
        teacher: Module | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        wrap: Callable[[Module], Module] = lambda model: model,
        passes: int = 1,
        fade: Callable[[Module, float], None] | None = None,
    ) -> None:
        """
        Args:
            model: trained in place.
            images: the training images.
            recipe: how.
            device: where.
            seed: of order, augmentation and drop-path.
            teacher: the dense model, when the recipe distils.
            rank: this worker's number.
            world: number of workers; each trains on its share of every batch.
            workers: loader processes.
            wrap: makes the form of the model that is called in training: the distributed one, the probe's.
            passes: forward and backward passes over each batch; their gradients are averaged.
            fade: takes a model and what is to be left of attentions that fade out of it: see `left_at`.

        Raises:
            ValueError: there are fewer images than one batch holds.
        """
        if len(images) < recipe.batch_size:
            raise ValueError(f"{len(images)} training images are fewer than one batch of {recipe.batch_size}")
        self.model = model.to(device)
        self.ema = timm.utils.ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        self.epochs_done = 0
        self._images, self._recipe, self._device, self._seed = images, recipe, device, seed
        self._teacher = teacher.to(device).eval() if teacher is not None else None
        self._rank, self._world, self._workers = rank, world, workers
        self._wrapped, self._passes = wrap(self.model), passes
        lr = recipe.lr * recipe.batch_size / 512
        self._optimizer = timm.optim.create_optimizer_v2(
            self.model, opt="adamw", lr=lr, weight_decay=recipe.weight_decay, fused=DEVICES[device.type].fused
        )
        self._steps = math.ceil(len(images) / world) // (recipe.batch_size // world)
        self._scheduler = timm.scheduler.CosineLRScheduler(
            self._optimizer,
            t_initial=max(1, recipe.epochs * self._steps),
            lr_min=min(recipe.min_lr, lr),
            warmup_t=round(recipe.warmup_epochs * self._steps),
            warmup_lr_init=min(recipe.min_lr, lr),
            warmup_prefix=False,
            t_in_epochs=False,
        )
        self._mixup = _mixup(recipe, self.classes)
        self._fade = fade
        self._fade_at(0)

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return cast(int, self.model.num_classes)

    @property
    def result(self) -> Module:
        """The model to evaluate and keep: the moving average where the recipe has one."""
        return self.ema.module if self.ema is not None else self.model

    def run_epoch(self) -> Epoch:
        """Train for one epoch.

        Raises:
            Diverged: the loss is not finite.
        """
        start, epoch = time.perf_counter(), self.epochs_done
        timm.utils.random_seed(self._seed + 7919 * epoch, self._rank)
        self._wrapped.train()
        batches = self._images.train_batches(
            self._recipe, self._seed, epoch, rank=self._rank, world=self._world, workers=self._workers
        )
        total, images = torch.zeros((), device=self._device), 0
        for step, (pixels, labels) in enumerate(batches, epoch * self._steps):
            total += self._step(step, pixels.to(self._device), labels.to(self._device))
            images += len(labels)
        synchronise(self._device)
        loss = float(total) / max(1, self._steps)
        if not np.isfinite(loss):
            raise Diverged(f"the loss became {loss} in epoch {epoch + 1}: lower the learning rate")
        self.epochs_done += 1
        self._fade_at(self.epochs_done * self._steps)
        return Epoch(self.epochs_done, loss, images, time.perf_counter() - start)

    def _step(self, step: int, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self._scheduler.step_update(step)
        self._fade_at(step)
        if self._mixup is not None:
            pixels, targets = self._mixup(pixels, labels)
        else:
            targets = timm.data.mixup.mixup_target(labels, self.classes, smoothing=self._recipe.label_smoothing)
        taught, total = self._taught(pixels), torch.zeros((), device=self._device)
        self._optimizer.zero_grad()
        for _ in range(self._passes):
            with autocast(self._device, self._recipe.amp):
                loss = self._loss(self._wrapped(pixels), targets, taught) / self._passes
            loss.backward()
            total += loss.detach()
        if self._recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._recipe.clip_grad)
        self._optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=step)
        return total

    def _fade_at(self, step: int) -> None:
        """Leave as much of what fades as there is to be at a step, in the model and its moving average."""
        if self._fade is not None:
            left = left_at(step, self._recipe.epochs * self._steps)
            self._fade(self.model, left)
            self._fade(self.result, left)

    def _taught(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """Return the teacher's logits, shape (B, K), where there is one."""
        if self._teacher is None or self._recipe.distillation == "none":
            return None
        with torch.no_grad(), autocast(self._device, self._recipe.amp):
            return cast(torch.Tensor, self._teacher(pixels).float())

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
        loss = F.cross_entropy(logits.float(), targets)
        if taught is None:
            return loss
        alpha = self._recipe.distillation_alpha
        return (1 - alpha) * loss + alpha * distillation_loss(logits.float(), taught, self._recipe)

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on after the epochs done; tensors and plain data only."""
        return {
            "epochs_done": self.epochs_done,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.epochs_done = state["epochs_done"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self._fade_at(self.epochs_done * self._steps)


def left_at(step: int, steps: int) -> float:
    """Return what is left of fading attentions at a step: from 1 at the first, 0, linearly to 0 at `FADING` of all."""
    return max(0.0, 1 - step / (FADING * max(1, steps)))


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


def evaluate(
    model: Module, images: ImageSet, device: torch.device, *, amp: bool = True, batch_size: int = 256, workers: int = 0
) -> NDArray[np.bool_]:
    """Return, for every image in order, whether the model's first choice is right; shape (images,)."""
    return choices(model, images, device, amp=amp, batch_size=batch_size, workers=workers) == images.labels


@torch.inference_mode()
def choices(
    model: Module, images: ImageSet, device: torch.device, *, amp: bool = True, batch_size: int = 256, workers: int = 0
) -> Indices:
    """Return the model's first choice for every image in order; shape (images,)."""
    model = model.to(device).eval()
    chosen = []
    for pixels, _ in images.eval_batches(batch_size, workers):
        with autocast(device, amp):
            chosen.append(model(pixels.to(device)).argmax(dim=1).cpu().numpy())
    return np.concatenate(chosen)
