"""Which images make up each batch of an epoch, who takes which of them, and what the randomness of each follows from.

All of it is a function of (seed, epoch) and of the place in the batch, never of the number of workers or of loader
processes: any number of workers sees the same batches, and so does a training that is gone on with.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trainables.settings import Recipe

Order = NDArray[np.int64]
"""The batches of an epoch, shape (steps, batch size, 2): an image's index, and which of its repeats this is."""


def epoch_order(images: int, recipe: Recipe, seed: int, epoch: int) -> Order:
    """Return all batches of an epoch, full ones only; shuffled by (seed, epoch).

    With repeated augmentation (Hoffer et al. 2020) an image is in a batch several times, differently augmented, and an
    epoch has as many steps as without, on so many fewer images.
    """
    steps, repeats = images // recipe.batch_size, recipe.repeated_augmentation
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(images)
    drawn = np.stack([np.repeat(order, repeats), np.tile(np.arange(repeats), images)], axis=1)
    batches = drawn[: steps * recipe.batch_size].reshape(steps, recipe.batch_size, 2)
    if repeats > 1:
        # Neighbours are mixed with each other: they should not be the same image.
        for batch in batches:
            rng.shuffle(batch)
    return batches


def grain(recipe: Recipe) -> int:
    """Return how many neighbours in a batch stay together: a pair, where images are mixed with each other."""
    return 2 if recipe.mixup or recipe.cutmix else 1


@dataclass(frozen=True)
class Share:
    """What a worker takes of every batch: a consecutive piece.

    Attributes:
        rank: this worker's number, from 0.
        world: number of workers.
    """

    rank: int = 0
    world: int = 1

    def of(self, size: int, grain: int = 1) -> slice:
        """Return the piece of `size` images; the pieces of all workers differ by at most one grain.

        Raises:
            ValueError: there are not enough images for every worker, or not a whole number of grains.
        """
        grains = size // grain
        if size % grain or grains < self.world:
            raise ValueError(
                f"a batch of {size} images cannot be shared by {self.world} workers"
                + (" in pairs, as mixup and cutmix need" if grain > 1 else "")
            )
        first, last = (grains * rank // self.world * grain for rank in (self.rank, self.rank + 1))
        return slice(first, last)


def parts_of(recipe: Recipe, world: int, most: int) -> int:
    """Return in how many parts every worker takes its piece of a batch, the gradients of the parts summed.

    Args:
        recipe: has the batch size, and the images that a worker takes at once if that is given.
        world: number of workers.
        most: the most workers there can be: where it is not given, a worker takes at once what it would with them.
    """
    sizes = [range(recipe.batch_size)[Share(rank, world).of(recipe.batch_size, grain(recipe))] for rank in range(world)]
    largest, smallest = max(map(len, sizes)), min(map(len, sizes))
    at_once = recipe.micro_batch or math.ceil(recipe.batch_size / max(most, world) / grain(recipe)) * grain(recipe)
    return min(math.ceil(largest / at_once), smallest)


class Pieces:
    """A worker's pieces of the batches of an epoch, as a loader takes them: a list of (index, repeat) each."""

    def __init__(self, order: Order, piece: slice) -> None:
        self._order, self._piece = order, piece

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[list[int]]]:
        for batch in self._order:
            yield batch[self._piece].tolist()


def key_of(*parts: int) -> int:
    """Return a number of 64 bits that follows from the parts, and is unrelated to that of any others."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def seed_augmentation(key: int, recipe: Recipe) -> None:
    """Seed what the recipe's transforms draw from: the generators of Python, torch's of the CPU, and NumPy's."""
    random.seed(key)
    torch.default_generator.manual_seed(key)
    if recipe.auto_augment:
        # Nothing else of timm's draws from it, and seeding takes as long as some transforms.
        np.random.seed(key % 2**32)
