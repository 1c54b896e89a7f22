"""Averages models of one surface by how well they explain the trials, and keeps beliefs near what was seen.

Whether a polynomial or a hint helps differs from surface to surface, so neither is taken on trust: the residual alone,
with a polynomial, and with hints too are weighted by their marginal likelihood. Arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpt_search.map_predictor import Array
from dpt_search.posterior import Data, Posterior, Surface

FENCE = 0.05
"""Means stay within this of the observed accuracies, in units of accuracy; what is beyond is drawn in, in its order."""


class Blend:
    """Beliefs about a surface, averaged over models with and without a polynomial and hints."""

    def __init__(self, points: Array, degree: int = 2, hints: Sequence[Array] = ()) -> None:
        """
        Args:
            points: [cells, 2], the ratios of every cell of a full lattice.
            degree: total degree of the polynomial; 0 leaves it out.
            hints: [cells] each, earlier surfaces, in units of accuracy.
        """
        self.models = [Surface(points, 0)]
        if degree:
            self.models.append(Surface(points, degree))
        shares = [1.0] * len(self.models)
        if hints:
            # Before any trial hints are as likely to help as not.
            self.models.append(Surface(points, degree, hints))
            shares.append(sum(shares))
        self._prior = np.log(shares)

    def posterior(self, data: Data) -> Posterior:
        """Return the posterior of all cells.

        Args:
            data: at least one observation.
        """
        found = [model.fit(data) for model in self.models]
        weights = _normalised(self._prior + np.array([evidence for _, evidence in found]))
        beliefs = [model.posterior(data, hyper) for model, (hyper, _) in zip(self.models, found, strict=True)]
        mean = sum(w * each.mean for w, each in zip(weights, beliefs, strict=True))
        covariance = np.zeros((len(mean), len(mean)))
        for weight, each in zip(weights, beliefs, strict=True):
            covariance += weight * (each.covariance + np.outer(each.mean - mean, each.mean - mean))
        noise = float(np.sqrt(sum(w * each.noise**2 for w, each in zip(weights, beliefs, strict=True))))
        return Posterior(_fenced(mean, data.means.min(), data.means.max()), covariance, noise)


def _normalised(logarithms: Array) -> Array:
    weights = np.exp(logarithms - logarithms.max())
    return weights / weights.sum()


def _fenced(mean: Array, lowest: float, highest: float) -> Array:
    """Return means within `FENCE` of the observed ones, in the same order as before."""
    above, below = np.maximum(mean - highest, 0.0), np.maximum(lowest - mean, 0.0)
    return np.clip(mean, lowest, highest) + above / (1 + above / FENCE) - below / (1 + below / FENCE)
