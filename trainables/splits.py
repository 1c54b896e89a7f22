"""Which images belong to which split, and class-balanced subsets of them."""

import zlib

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "probe", "val", "test")
"""train: training. probe: the probe's evaluation. val: trials and choices. test: the final figure, read once."""

_CARVED = {"test": (0.1, 10_000), "val": (0.1, 10_000), "probe": (0.05, 2_000)}
"""Share of the training part, and most images, that a split missing from the user's data is given."""

Indices = NDArray[np.int64]


def balanced_subset(labels: Indices, size: int, seed: int) -> Indices:
    """Draw `size` indices with equal counts per class, as far as the classes go; sorted, the same for the same seed.

    Args:
        labels: class of every image, shape (images,).
        size: number of indices; 0, or more than there are, means all.
        seed: the draw's seed.
    """
    if size <= 0 or size >= len(labels):
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    # Round robin over the classes: every class gives its n-th image before any gives its (n+1)-th.
    by_turn = order[np.argsort(turn[order], kind="stable")]
    return np.sort(by_turn[:size])


def assign(labels: Indices, given: frozenset[str], seed: int) -> dict[str, Indices]:
    """Split the training part into `train` and the splits that the user's data lacks.

    Args:
        labels: class of every image of the training part, shape (images,).
        given: names of the splits that the data has.
        seed: the split's seed.

    Returns:
        Disjoint sorted indices into the training part, for `train` and for each missing split.
    """
    left = np.arange(len(labels))
    parts: dict[str, Indices] = {}
    for split, (share, most) in _CARVED.items():
        if split not in given:
            size = max(1, min(most, int(share * len(labels))))
            parts[split] = left[balanced_subset(labels[left], size, seed + zlib.crc32(split.encode()))]
            left = np.setdiff1d(left, parts[split])
    return {**parts, "train": left}
