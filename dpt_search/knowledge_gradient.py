"""The exact knowledge gradient for a finite set of alternatives, many candidates at once. Arrays in, arrays out.

Source: Frazier, Powell and Dayanik, "The Knowledge-Gradient Policy for Correlated Normal Beliefs" (2009).
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr

from dpt_search.map_predictor import Array

_BLOCK = 2_000_000
"""Entries of one intermediate array: bounds the memory."""


def knowledge_gradient(mean: Array, slopes: Array) -> Array:
    """Return how much the best posterior mean is expected to grow by one more trial of each candidate.

    E[max_i (mean_i + slopes_ci Z)] - max_i mean_i for a standard normal Z: the alternatives are lines in Z, and the
    upper envelope of the lines gives the expectation in closed form.

    Args:
        mean: [m] posterior means of the alternatives.
        slopes: [c, m] change of every posterior mean per standard deviation of each candidate's outcome.

    Returns:
        [c], never negative.
    """
    rows = max(1, _BLOCK // max(1, slopes.shape[1] ** 2))
    return np.concatenate([_block(mean, slopes[start : start + rows]) for start in range(0, len(slopes), rows)])


def _block(mean: Array, slopes: Array) -> Array:
    rise = slopes[:, :, None] - slopes[:, None, :]
    drop = mean[None, None, :] - mean[None, :, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = drop / rise
    # Line i is on top of line j from `cross` on when it is the steeper one, up to `cross` when it is the flatter.
    low = np.where(rise > 0, cross, -np.inf)
    start = low.max(axis=2)
    end = np.where(rise < 0, cross, np.inf).min(axis=2)
    # Of lines with one slope the highest counts; of equal ones the first.
    index = np.arange(len(mean))
    earlier = index[None, :] < index[:, None]
    covered = (rise == 0) & ((drop > 0) | ((drop == 0) & earlier[None]))
    visible = (start < end) & ~covered.any(axis=2) & np.isfinite(start)
    before = np.where(low == start[:, :, None], slopes[:, None, :], np.inf).min(axis=2)
    distance = np.where(visible, np.abs(start), np.inf)
    step = np.where(visible, slopes - np.where(np.isfinite(before), before, 0.0), 0.0)
    return (step * _expected_excess(distance)).sum(axis=1)


def _expected_excess(distance: Array) -> Array:
    """Return E[max(Z - distance, 0)] for a standard normal Z."""
    finite = np.where(np.isfinite(distance), distance, 0.0)
    density = np.exp(-0.5 * finite**2) / np.sqrt(2 * np.pi)
    return np.where(np.isfinite(distance), np.maximum(density - finite * ndtr(-finite), 0.0), 0.0)
