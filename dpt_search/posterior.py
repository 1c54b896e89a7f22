"""The blend: MAP's polynomial as a Bayesian mean, a smooth residual, and trial noise. Arrays in, arrays out.

    accuracy(cell) = constant + polynomial(ratios) + residual(ratios) + noise of the trial

The constant has a flat prior, the polynomial's other coefficients zero-centred normal ones, and the residual is a
Gaussian process, so predictions are proper from the first observation on. With flat priors on the coefficients and no
residual it is MapPredictor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize

from dpt_search.map_predictor import Array, monomials

_JITTER = 1e-10


@dataclass(frozen=True)
class Hyperparameters:
    """What the model learns besides the surface itself; standard deviations are in units of accuracy (0 to 1).

    Attributes:
        slope: prior sd of the polynomial's coefficients of degree >= 1, over ratios from 0 to 1.
        residual: sd of the smooth residual.
        length: length scale of the residual, in ratios.
        noise: sd of one trial about its cell's true accuracy.
    """

    slope: float = 0.2
    residual: float = 0.03
    length: float = 0.35
    noise: float = 0.004


_PRIOR = {"slope": (0.2, 1.0), "residual": (0.03, 1.0), "length": (0.35, 0.4), "noise": (0.004, 0.5)}
"""Log-normal priors: median, and sd of the logarithm."""


@dataclass(frozen=True)
class Data:
    """Observations, averaged by cell: what the model needs to know of them.

    Attributes:
        cells: [k] index of each observed cell into the lattice's points, without repeats.
        means: [k] mean accuracy of its trials.
        counts: [k] number of its trials.
        scatter: sum of squared differences of the trials from their cells' means.
    """

    cells: np.ndarray
    means: Array
    counts: Array
    scatter: float

    @classmethod
    def of(cls, cells: np.ndarray, accuracies: Array) -> Data:
        """Average repeated trials; the order of the observations does not matter.

        Args:
            cells: [n] indices into the lattice's points.
            accuracies: [n].
        """
        unique, where, counts = np.unique(np.asarray(cells, dtype=np.int64), return_inverse=True, return_counts=True)
        order = np.lexsort((accuracies, where))
        where, accuracies = where[order], np.asarray(accuracies, dtype=np.float64)[order]
        means = np.bincount(where, accuracies, minlength=len(unique)) / counts
        return cls(unique, means, counts.astype(np.float64), float(np.sum((accuracies - means[where]) ** 2)))


@dataclass(frozen=True)
class Posterior:
    """Beliefs about the true accuracy of every cell.

    Attributes:
        mean: [cells].
        covariance: [cells, cells].
        noise: sd of one more trial about its cell's true accuracy.
    """

    mean: Array
    covariance: Array
    noise: float

    @cached_property
    def sd(self) -> Array:
        """[cells] standard deviation of the true accuracy."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 0.0))

    def with_pending(self, cells: np.ndarray) -> Posterior:
        """Return beliefs once trials of `cells` end as predicted: the means stay, the uncertainty shrinks."""
        covariance = self.covariance
        for cell in cells:
            column = covariance[:, cell]
            covariance = covariance - np.outer(column, column) / (column[cell] + self.noise**2)
        return Posterior(self.mean, covariance, self.noise)


class Surface:
    """The model over one lattice."""

    def __init__(self, points: Array, degree: int = 2) -> None:
        """
        Args:
            points: [cells, 2], the ratios of every cell.
            degree: total degree of the polynomial; 0 leaves a constant mean.
        """
        self._terms = monomials(points, degree)[:, 1:]
        self.points = np.asarray(points, dtype=np.float64)
        difference = self.points[:, None, :] - self.points[None, :, :]
        self._squared = (difference**2).sum(-1)

    def prior(self, hyper: Hyperparameters) -> Array:
        """Return the prior covariance of all cells' accuracies without the constant, [cells, cells]."""
        terms = self._terms
        smooth = np.exp(-0.5 * self._squared / hyper.length**2)
        return hyper.slope**2 * terms @ terms.T + hyper.residual**2 * smooth

    def posterior(self, data: Data, hyper: Hyperparameters | None = None) -> Posterior:
        """Return the posterior of all cells.

        Args:
            data: at least one observation.
            hyper: fixed hyperparameters; None learns them by `fit`.
        """
        hyper = hyper or self.fit(data)
        prior = self.prior(hyper)
        across = prior[data.cells]
        lower = np.linalg.cholesky(across[:, data.cells] + np.diag(hyper.noise**2 / data.counts + _JITTER))
        half = solve_triangular(lower, across, lower=True)
        ones = solve_triangular(lower, np.ones(len(data.cells)), lower=True)
        seen = solve_triangular(lower, data.means, lower=True)
        # The constant has a flat prior: its generalised least-squares estimate, and what that leaves uncertain.
        precision = float(ones @ ones)
        constant = float(ones @ seen) / precision
        unexplained = 1 - half.T @ ones
        mean = constant + half.T @ (seen - constant * ones)
        covariance = prior - half.T @ half + np.outer(unexplained, unexplained) / precision
        return Posterior(mean, covariance, hyper.noise)

    def fit(self, data: Data) -> Hyperparameters:
        """Return the hyperparameters with the highest marginal likelihood times prior, the constant integrated out."""
        names = tuple(_PRIOR)
        centre = np.log([_PRIOR[name][0] for name in names])
        width = np.array([_PRIOR[name][1] for name in names])

        def loss(z: Array) -> tuple[float, Array]:
            hyper = _named(centre + width * z)
            value, gradient = self._negative_log_likelihood(data, hyper)
            return value + 0.5 * float(z @ z), np.array([gradient[n] for n in names]) * width + z

        found = minimize(loss, np.zeros(len(names)), jac=True, method="L-BFGS-B", bounds=[(-3.0, 3.0)] * len(names))
        return _named(centre + width * found.x)

    def _negative_log_likelihood(self, data: Data, hyper: Hyperparameters) -> tuple[float, dict[str, float]]:
        """Return the value (up to a constant) and its gradient in the logarithm of each hyperparameter."""
        at = np.ix_(data.cells, data.cells)
        terms = self._terms[data.cells]
        squared = self._squared[at]
        slope = hyper.slope**2 * terms @ terms.T
        smooth = hyper.residual**2 * np.exp(-0.5 * squared / hyper.length**2)
        noise = np.diag(hyper.noise**2 / data.counts)
        lower = np.linalg.cholesky(slope + smooth + noise + _JITTER * np.eye(len(data.cells)))
        inverse = cho_solve((lower, True), np.eye(len(data.cells)))
        ones = inverse.sum(1)
        total = float(ones.sum())
        # The constant's own estimate is taken out and its uncertainty counted: restricted maximum likelihood.
        residual = data.means - float(ones @ data.means) / total
        weights = inverse @ residual
        repeats = float(np.sum(data.counts - 1))
        value = float(np.log(np.diag(lower)).sum()) + 0.5 * float(residual @ weights) + 0.5 * np.log(total)
        value += repeats * np.log(hyper.noise) + 0.5 * data.scatter / hyper.noise**2
        projected = inverse - np.outer(ones, ones) / total

        def slope_of(change: Array) -> float:
            return 0.5 * float((projected * change).sum()) - 0.5 * float(weights @ change @ weights)

        return value, {
            "slope": slope_of(2 * slope),
            "residual": slope_of(2 * smooth),
            "length": slope_of(smooth * squared / hyper.length**2),
            "noise": slope_of(2 * noise) + repeats - data.scatter / hyper.noise**2,
        }


def _named(logarithms: Array) -> Hyperparameters:
    """Return hyperparameters from their logarithms, in the order of the priors."""
    slope, residual, length, noise = map(float, np.exp(logarithms))
    return Hyperparameters(slope, residual, length, noise)
