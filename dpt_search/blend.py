"""Averages models of one surface by how well they explain the trials, and keeps beliefs near what was seen.

Whether a polynomial or a hint helps differs from surface to surface, so neither is taken on trust: the residual alone,
with a polynomial, and with one hint after another are weighted by their marginal likelihood. The dense model's accuracy
is known before any trial, and nearly that of a trial without removals. Arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpt_search.kernel import Hyperparameters
from dpt_search.map_predictor import Array
from dpt_search.posterior import Data, Hint, Posterior, Surface

FENCE = 0.05
"""Means stay within this of the observed accuracies, in units of accuracy; what is beyond is drawn in, in its order."""
DENSE_SD = 0.02
"""Standard deviation of what training as a trial does changes of the dense model's accuracy, in units of accuracy."""
NEGLIGIBLE = 0.01
"""A model of less weight is left out."""


class Blend:
    """Beliefs about a surface, averaged over models with and without a polynomial and hints."""

    def __init__(self, points: Array, degree: int = 2, hints: Sequence[Hint] = (), dense: float | None = None) -> None:
        """
        Args:
            points: [cells, 2], the ratios of every cell of a full lattice.
            degree: total degree of the polynomial; 0 leaves it out.
            hints: earlier surfaces, the one that is trusted most first.
            dense: accuracy of the dense model; None where it is not known.
        """
        self._dense, self._whole = dense, int(np.argmin(points.sum(axis=1)))
        self.models = [Surface(points, 0)]
        if degree:
            self.models.append(Surface(points, degree))
        shares = [1.0] * len(self.models)
        for known in range(1, len(hints) + 1):
            self.models.append(Surface(points, degree, hints[:known]))
            shares.append(hints[known - 1].trust * sum(shares))
        self._prior = np.log(shares)

    def fit(self, data: Data) -> list[tuple[Hyperparameters, float]]:
        """Return hyperparameters and evidence of each model; those without hints are alike and begin at the first's."""
        found = [self.models[0].fit(data)]
        for model in self.models[1:]:
            found.append(model.fit(data, None if model.hinted else found[0][0]))
        return found

    def by_model(self, data: Data, cells: np.ndarray | None = None) -> list[tuple[float, Posterior]]:
        """Return each model's weight and its posterior of all cells, or of some; models of little weight are left out.

        Args:
            data: at least one observation, or none where the dense model's accuracy is known.
            cells: [k] indices of the cells asked about; None for all.
        """
        data = self._told(data)
        found = self.fit(data)
        weights = _normalised(self._prior + np.array([evidence for _, evidence in found]))
        weights = np.where(weights < NEGLIGIBLE, 0.0, weights) / weights[weights >= NEGLIGIBLE].sum()
        return [
            (float(weight), model.posterior(data, hyper, cells))
            for weight, model, (hyper, _) in zip(weights, self.models, found, strict=True)
            if weight
        ]

    def posterior(self, data: Data, cells: np.ndarray | None = None) -> Posterior:
        """Return the averaged posterior of all cells, or of some.

        Args:
            data: at least one observation, or none where the dense model's accuracy is known.
            cells: [k] indices of the cells asked about; None for all.
        """
        data = self._told(data)
        counted = self.by_model(data, cells)
        mean = np.sum([weight * each.mean for weight, each in counted], axis=0)
        covariance = np.zeros((len(mean), len(mean)))
        for weight, each in counted:
            covariance += weight * (each.covariance + np.outer(each.mean - mean, each.mean - mean))
        noise = float(np.sqrt(sum(weight * each.noise**2 for weight, each in counted)))
        return Posterior(_fenced(mean, data.means.min(), data.means.max()), covariance, noise)

    def _told(self, data: Data) -> Data:
        # A trial without removals says itself what the dense model's accuracy lets expect.
        if self._dense is None or self._whole in data.cells:
            return data
        return data.knowing(self._whole, self._dense, DENSE_SD)


def _normalised(logarithms: Array) -> Array:
    weights = np.exp(logarithms - logarithms.max())
    return weights / weights.sum()


def _fenced(mean: Array, lowest: float, highest: float) -> Array:
    """Return means within `FENCE` of the observed ones, in the same order as before."""
    above, below = np.maximum(mean - highest, 0.0), np.maximum(lowest - mean, 0.0)
    return np.clip(mean, lowest, highest) + above / (1 + above / FENCE) - below / (1 + below / FENCE)
