"""95 % intervals of measured accuracies and speedups."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Z = 1.959964  # two-sided 95 % quantile of the normal distribution


def accuracy_interval(right: NDArray[np.bool_]) -> dict[str, float]:
    """Return accuracy, low and high from one boolean per image, shape (images,).

    The interval is Wilson's (1927), which stays within [0, 1].
    """
    n, p = len(right), float(np.mean(right))
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * np.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return {"accuracy": p, "low": float(centre - half), "high": float(centre + half)}


def paired_difference(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> dict[str, float]:
    """Return mean, low and high of `after` minus `before` on the same images, both of shape (images,).

    Normal approximation for the mean of the per-image differences in {-1, 0, 1}.
    """
    change = after.astype(float) - before.astype(float)
    mean, half = float(change.mean()), float(_Z * change.std(ddof=1) / np.sqrt(len(change)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and a 95 % interval of it from order statistics (the sample's ends for fewer than 6 values)."""
    ordered = np.sort(np.asarray(values, float))
    half = _Z * np.sqrt(len(ordered)) / 2
    low = max(0, int(np.floor(len(ordered) / 2 - half)))
    high = min(len(ordered) - 1, int(np.ceil(len(ordered) / 2 + half)))
    return float(np.median(ordered)), float(ordered[low]), float(ordered[high])
