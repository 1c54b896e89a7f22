"""The only training loop and the only evaluation loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from search_spaces.timm_compat import timm
from trainables.batches import key_of, parts_of
from trainables.compiling import compile_in_place
from trainables.data import ImageSet
from trainables.devices import DEVICES, autocast, grad_scaler, synchronise
from trainables.group import Group
from trainables.objective import Objective
from trainables.recomputing import recompute_activations
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


ALONE = Group()


class Training:
    """A model, the images it learns from, and all that changes while it does; one call of `run_epoch` at a time.

    What is random follows from (seed, epoch) and the image, or the batch; drop-path from this worker's number too. So
    a training that goes on from `state_dict` after any epoch does what the uninterrupted one does, and any number of
    workers takes the same steps, up to rounding.
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
        group: Group = ALONE,
        workers: int = 0,
        wrap: Callable[[Module], Module] | None = None,
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
            group: the workers that share every batch.
            workers: loader processes.
            wrap: makes the form of the model that is called in training, such as the probe's.
            passes: forward and backward passes over each batch; their gradients are averaged.
            fade: takes a model and what is to be left of attentions that fade out of it: see `left_at`.

        Raises:
            ValueError: there are fewer images than one batch holds, or a batch cannot be shared by the workers.
            BadInput: the model cannot be trained as the recipe says.
        """
        if len(images) < recipe.batch_size:
            raise ValueError(f"{len(images)} training images are fewer than one batch of {recipe.batch_size}")
        self.model = model.to(device)
        self.ema = timm.utils.ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        self.epochs_done = 0
        self._images, self._recipe, self._device, self._seed = images, recipe, device, seed
        self._group, self._workers, self._passes, self._fade = group, workers, passes, fade
        self._parts = parts_of(recipe, group.world, group.most)
        teacher = teacher.to(device).eval() if teacher is not None else None
        self._objective = Objective(recipe, cast(int, model.num_classes), teacher)
        if recipe.recompute_activations:
            recompute_activations(self.model, blocks_stay=fade is None and wrap is None)
        if recipe.compile:
            compile_in_place(self.model)
        self._wrapped = group.distributed(wrap(self.model) if wrap is not None else self.model)
        self._has_stepped = False
        self._scaler = grad_scaler(device, recipe.amp)
        self._steps = len(images) // recipe.batch_size
        self._optimizer, self._scheduler = self._optimisation()
        self._fade_at(0)

    def _optimisation(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return optimiser and schedule."""
        recipe = self._recipe
        lr = recipe.lr * recipe.batch_size / 512
        optimizer = timm.optim.create_optimizer_v2(
            self.model, opt="adamw", lr=lr, weight_decay=recipe.weight_decay, betas=tuple(recipe.betas),
            fused=DEVICES[self._device.type].fused,
        )  # fmt: skip
        scheduler = timm.scheduler.CosineLRScheduler(
            optimizer,
            t_initial=max(1, recipe.epochs * self._steps),
            lr_min=min(recipe.min_lr, lr),
            warmup_t=round(recipe.warmup_epochs * self._steps),
            warmup_lr_init=min(recipe.min_lr, lr),
            warmup_prefix=False,
            t_in_epochs=False,
        )
        return optimizer, scheduler

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
        self._wrapped.train()
        batches = self._images.train_batches(
            self._recipe, self._seed, epoch, share=self._group.share, workers=self._workers
        )
        total, images = torch.zeros((), device=self._device), 0
        for step, (pixels, labels) in enumerate(batches, epoch * self._steps):
            total += self._step(step, pixels.to(self._device), labels.to(self._device))
            images += len(labels)
        total = self._group.sum(total)
        synchronise(self._device)
        loss = float(total) / max(1, self._steps)
        if not np.isfinite(loss):
            raise Diverged(f"the loss became {loss} in epoch {epoch + 1}: lower the learning rate")
        self.epochs_done += 1
        self._fade_at(self.epochs_done * self._steps)
        return Epoch(self.epochs_done, loss, images, time.perf_counter() - start)

    def _step(self, step: int, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Take one step; return this worker's addend of the batch's mean loss."""
        self._scheduler.step_update(step)
        self._fade_at(step)
        pixels, targets = self._objective.targets(pixels, labels, key_of(self._seed, step))
        # Drop-path's; what was drawn for images, here or in loader processes, must not show in it.
        torch.manual_seed(key_of(self._seed, step, self._group.rank))
        total = torch.zeros((), device=self._device)
        self._optimizer.zero_grad()
        parts = zip(pixels.tensor_split(self._parts), targets.tensor_split(self._parts), strict=True)
        for number, (some, wanted) in enumerate(parts, 1):
            # A static graph is learnt in a backward pass that ends with a reduction.
            with self._group.keeping_gradients(self._wrapped, self._has_stepped and number < self._parts):
                total += self._backward(some, wanted)
        if self._recipe.clip_grad:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._recipe.clip_grad)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._has_stepped = True
        if self.ema is not None:
            self.ema.update(self.model, step=step)
        return total

    def _backward(self, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Add the gradients of some images, weighted by their share of the batch; return their addend of its loss."""
        taught, total = self._objective.taught(pixels), torch.zeros((), device=self._device)
        share = len(pixels) / self._recipe.batch_size / self._passes
        for _ in range(self._passes):
            loss = share * self._objective.loss(self._wrapped, pixels, targets, taught)
            # The average over the workers is taken, where a sum is wanted.
            self._scaler.scale(loss * self._group.world).backward()
            total += loss.detach()
        return total

    def _fade_at(self, step: int) -> None:
        """Leave as much of what fades as there is to be at a step, in the model and its moving average."""
        if self._fade is not None:
            left = left_at(step, self._recipe.epochs * self._steps)
            self._fade(self.model, left)
            self._fade(self.result, left)

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on after the epochs done; tensors and plain data only."""
        return {
            "epochs_done": self.epochs_done,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.epochs_done = state["epochs_done"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])
        self._fade_at(self.epochs_done * self._steps)


def left_at(step: int, steps: int) -> float:
    """Return what is left of fading attentions at a step: from 1 at the first, 0, linearly to 0 at `FADING` of all."""
    return max(0.0, 1 - step / (FADING * max(1, steps)))


def evaluate(
    model: Module, images: ImageSet, device: torch.device, *, amp: bool = True, batch_size: int = 256, workers: int = 0
) -> NDArray[np.bool_]:
    """Return, for every image in order, whether the model's first choice is right; shape (images,)."""
    return choices(model, images, device, amp=amp, batch_size=batch_size, workers=workers) == images.labels


def choices(
    model: Module, images: ImageSet, device: torch.device, *, amp: bool = True, batch_size: int = 256, workers: int = 0
) -> Indices:
    """Return the model's first choice for every image in order; shape (images,)."""
    return np.concatenate(
        [logits.argmax(dim=1).numpy() for logits in _logits(model, images, device, amp, batch_size, workers)]
    )


def accuracy_and_loss(
    model: Module, images: ImageSet, device: torch.device, *, amp: bool = True, batch_size: int = 256, workers: int = 0
) -> tuple[float, float]:
    """Return the share of images whose first choice is right, and the mean cross-entropy in nats."""
    logits = torch.cat(list(_logits(model, images, device, amp, batch_size, workers)))
    labels = torch.as_tensor(images.labels)
    return float((logits.argmax(dim=1) == labels).double().mean()), float(cross_entropy(logits.double(), labels))


@torch.inference_mode()
def _logits(
    model: Module, images: ImageSet, device: torch.device, amp: bool, batch_size: int, workers: int
) -> Iterator[torch.Tensor]:
    """Yield the model's outputs on the CPU, batch by batch, for the images in order."""
    model = model.to(device).eval()
    for pixels, _ in images.eval_batches(batch_size, workers):
        with autocast(device, amp):
            logits = model(pixels.to(device)).cpu()
        yield logits
