"""The exact knowledge gradient for a finite set of alternatives, many candidates at once. Arrays in, arrays out.

Source: Frazier, Powell and Dayanik, "The Knowledge-Gradient Policy for Correlated Normal Beliefs" (2009). They sort the
lines and scan; here the envelope is walked from the best mean outwards, every candidate at once: few lines are on it.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr

from dpt_search.map_predictor import Array

_NEVER = 40.0
"""Standard deviations beyond which the excess of a normal outcome is zero in float64: the walk ends there."""


def knowledge_gradient(mean: Array, slopes: Array) -> Array:
    """Return how much the best posterior mean is expected to grow by one more trial of each candidate.

    E[max_i (mean_i + slopes_ci Z)] - max_i mean_i for a standard normal Z: the alternatives are lines in Z, and the
    upper envelope of the lines gives the expectation in closed form.

    Args:
        mean: [m] posterior means of the alternatives, or [c, m] where candidates are of different beliefs.
        slopes: [c, m] change of every posterior mean per standard deviation of each candidate's outcome.

    Returns:
        [c], never negative.
    """
    # A negative outcome of a candidate is a positive one of its mirror image.
    mean = np.broadcast_to(mean, slopes.shape)
    upwards = _upwards(np.concatenate([mean, mean]), np.concatenate([slopes, -slopes]))
    return upwards[: len(slopes)] + upwards[len(slopes) :]


def _upwards(mean: Array, slopes: Array) -> Array:
    """Return the part of positive outcomes, [c]: the envelope from the best mean on, breakpoint by breakpoint."""
    total = np.zeros(len(slopes))
    rows, top = np.arange(len(slopes)), mean.argmax(axis=1)
    # Every step is to a steeper line, so a candidate takes fewer steps than there are alternatives.
    while len(rows):
        each = np.arange(len(rows))
        rise = slopes - slopes[each, top][:, None]
        drop = mean[each, top][:, None] - mean
        with np.errstate(over="ignore"):
            crossing = np.divide(drop, rise, out=np.full(rise.shape, np.inf), where=rise > 0)
        following = crossing.argmin(axis=1)
        distance = crossing[each, following]
        on = distance < _NEVER
        total[rows[on]] += rise[each, following][on] * _expected_excess(distance[on])
        rows, mean, slopes, top = rows[on], mean[on], slopes[on], following[on]
    return total


def _expected_excess(distance: Array) -> Array:
    """Return E[max(Z - distance, 0)] for a standard normal Z."""
    density = np.exp(-0.5 * distance**2) / np.sqrt(2 * np.pi)
    return np.maximum(density - distance * ndtr(-distance), 0.0)
