"""The blend over one lattice: polynomial, hints, a smooth residual, and trial noise. Arrays in, arrays out.

    accuracy(cell) = constant + polynomial(ratios) + hints(cell) + residual(cell) + noise of the trial

The constant has a flat prior and every other part a normal one, so predictions are proper from the first observation
on. With flat priors on the polynomial and nothing else it is MapPredictor.

The residual is made for what real surfaces look like:
- it is a sum of one function per kind of unit and a smaller joint one, because the kinds nearly add up: any trial
  tells of its whole row and its whole column;
- its distances are in the logarithm of the units that are left, because the next removal matters more the fewer are
  left: a plateau at first, steep at the end;
- every unit has a loss of its own, a step in its row or column, and every cell a little accuracy of its own, so that
  many trials in one place count more than what lies around it;
- the removal of the last unit of a kind is a cliff, taken to be one until seen otherwise: without any attention tokens
  cannot mix. Cells beyond it tell little of the others.

A hint is an earlier surface, such as the elastic probe's. Its coefficient is learnt, from what is expected of the first
hint and from 0 on for others, and so is one each for its mean over rows, its mean over columns and what they leave,
because one kind of unit may recover better than the hint knows. What the first hint itself is not sure of is so much
more for the residual to explain, in the way it is unsure: a surface through a few cells is only as good as that between
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dpotrf, dpotri
from scipy.optimize import minimize

from dpt_search.kernel import FittedKernel, Hyperparameters, Kernel, levels_of, parts_of
from dpt_search.map_predictor import Array, monomials

_JITTER = 1e-10
_TOLERANCE = 1e-4
"""Relative change of the likelihood at which its maximum counts as found."""
_FIT_CELLS = 48
"""Observed cells that the hyperparameters are learnt from, at most: more make them no better and take longer."""


_ALWAYS = ("step", "own", "single", "joint", "length", "cliff_attn", "cliff_act", "noise")
"""Hyperparameters of every model; the others are those of its features."""
_WIDTH = {
    "slope": 1.0, "hint": 0.7, "shape": 1.0, "step": 0.7, "own": 0.5, "single": 1.0, "joint": 1.0, "length": 0.4,
    "cliff_attn": 1.0, "cliff_act": 1.0, "noise": 0.5,
}  # fmt: skip
"""Priors are log-normal: their medians are the defaults, and these the sd of the logarithms."""
_HINTED = {"slope": 0.02, "single": 0.01, "joint": 0.007, "cliff_attn": 0.003, "cliff_act": 0.003}
"""Medians where there are hints: what these leave to explain is smaller, and cliffs are in them."""
_PROBED_SLOPE = 0.005
"""Median where it is known what to expect of the first hint: single trials are not to bend that."""


@dataclass(frozen=True)
class Data:
    """Observations, averaged by cell: what the model needs to know of them.

    Attributes:
        cells: [k] index of each observed cell into the lattice's points, without repeats but for what is known besides.
        means: [k] mean accuracy of its trials.
        counts: [k] number of its trials.
        scatter: sum of squared differences of the trials from their cells' means.
        extra: [k] variance of each about its cell's true accuracy, beside the trials' noise: 0 for trials.
    """

    cells: np.ndarray
    means: Array
    counts: Array
    scatter: float
    extra: Array

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
        scatter = float(np.sum((accuracies - means[where]) ** 2))
        return cls(unique, means, counts.astype(np.float64), scatter, np.zeros(len(unique)))

    def knowing(self, cell: int, accuracy: float, sd: float) -> Data:
        """Return these observations and what is known of a cell besides, which is no trial.

        Args:
            cell: its index.
            accuracy: what is known.
            sd: of what a trial's true accuracy may differ by.
        """
        return Data(
            np.r_[cell, self.cells], np.r_[accuracy, self.means], np.r_[1.0, self.counts], self.scatter,
            np.r_[sd**2, self.extra],
        )  # fmt: skip

    def thinned(self, most: int) -> Data:
        """Return at most so many of the cells, evenly taken from all."""
        if len(self.cells) <= most:
            return self
        kept = np.linspace(0, len(self.cells) - 1, most).round().astype(int)
        share = float(np.sum(self.counts[kept] - 1) / max(1.0, np.sum(self.counts - 1)))
        return Data(self.cells[kept], self.means[kept], self.counts[kept], share * self.scatter, self.extra[kept])


@dataclass(frozen=True)
class Hint:
    """An earlier surface.

    Attributes:
        mean: [cells], in units of accuracy.
        covariance: [cells, cells] of what it is not sure of; None where that is not known.
        trust: how many times as likely it is, before any trial, that it helps than that it does not.
        expected: [cells], the accuracies that trials are expected to have, but for a constant; None: the mean itself.
        spread: how much wider than a probe's the coefficients spread of its mean over rows (attentions), of its mean
            over columns (activations) and of what they leave; between data sets and models they go from a tenth to
            three.
    """

    mean: Array
    covariance: Array | None = None
    trust: float = 0.3
    expected: Array | None = None
    spread: float = 4.0

    @property
    def expectation(self) -> Array:
        """[cells] what is expected of trials before the first, but for a constant."""
        return self.mean if self.expected is None else self.expected


@dataclass(frozen=True)
class Posterior:
    """Beliefs about the true accuracy of every cell, or of those asked about.

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
        if len(cells) == 0:
            return self
        columns = self.covariance[:, cells]
        lower = np.linalg.cholesky(columns[cells] + np.diag(np.full(len(cells), self.noise**2)))
        known = solve_triangular(lower, columns.T, lower=True)
        return Posterior(self.mean, self.covariance - known.T @ known, self.noise)


class Surface:
    """The model over one lattice."""

    def __init__(self, points: Array, degree: int = 2, hints: Sequence[Hint] = ()) -> None:
        """
        Args:
            points: [cells, 2], the ratios of every cell of a full lattice.
            degree: total degree of the polynomial; 0 leaves a constant mean.
            hints: earlier surfaces.
        """
        points = np.asarray(points, dtype=np.float64)
        levels = levels_of(points)
        features = {}
        if degree:
            features["slope"] = monomials(points, degree)[:, 1:]
        if hints:
            features["hint"] = np.stack([hint.mean - hint.mean.mean() for hint in hints], axis=1)
            features["shape"] = np.concatenate([h.spread * parts_of(h.mean, *levels) for h in hints], axis=1)
        self.hinted = bool(hints)
        self._medians = asdict(Hyperparameters()) | (_HINTED if hints else {})
        if hints and hints[0].expected is not None:
            self._medians["slope"] = _PROBED_SLOPE
        self._everywhere = np.arange(len(points))
        self._hinted = hints[0].expectation if hints else np.zeros(len(points))
        self._edges = np.stack([(level == level.max()) & (level > 0) for level in levels]).astype(np.float64)
        self._kernel = Kernel(levels, features, hints[0].covariance if hints else None)
        self.names = (*features, *_ALWAYS)

    def _mean(self, hyper: Hyperparameters) -> Array:
        """Return the prior mean of all cells without the constant, [cells]."""
        return self._hinted - hyper.cliff_attn * self._edges[0] - hyper.cliff_act * self._edges[1]

    def posterior(self, data: Data, hyper: Hyperparameters | None = None, cells: np.ndarray | None = None) -> Posterior:
        """Return the posterior of all cells, or of some.

        Args:
            data: at least one observation.
            hyper: fixed hyperparameters; None learns them by `fit`.
            cells: [k] indices of the cells asked about; None for all.
        """
        hyper = hyper or self.fit(data)[0]
        asked = self._everywhere if cells is None else cells
        seen = self._kernel.between(hyper, data.cells, data.cells)
        lower = np.linalg.cholesky(seen + np.diag(hyper.noise**2 / data.counts + data.extra + _JITTER))
        half = solve_triangular(lower, self._kernel.between(hyper, data.cells, asked), lower=True, check_finite=False)
        expected = self._mean(hyper)
        told = np.stack([np.ones(len(data.cells)), data.means - expected[data.cells]], axis=1)
        ones, residual = solve_triangular(lower, told, lower=True, check_finite=False).T
        # The constant has a flat prior: its generalised least-squares estimate, and what that leaves uncertain.
        precision = float(ones @ ones)
        constant = float(ones @ residual) / precision
        unexplained = (1 - half.T @ ones) / np.sqrt(precision)
        mean = expected[asked] + constant + half.T @ (residual - constant * ones)
        covariance = self._kernel.between(hyper, asked, asked)
        covariance -= half.T @ half
        covariance += np.outer(unexplained, unexplained)
        return Posterior(mean, covariance, hyper.noise)

    def fit(self, data: Data, start: Hyperparameters | None = None) -> tuple[Hyperparameters, float]:
        """Return the hyperparameters with the highest marginal likelihood times prior, and its logarithm.

        The constant is integrated out; the logarithm leaves out what is the same for every model of the same data.

        Args:
            data: at least one observation.
            start: where the search for them begins; None for their prior medians.
        """
        data = data.thinned(_FIT_CELLS)
        kernel = FittedKernel(self._kernel, data.cells)
        names = self.names
        centre = np.log([self._medians[name] for name in names])
        width = np.array([_WIDTH[name] for name in names])

        def loss(z: Array) -> tuple[float, Array]:
            value, gradient = self._negative_log_likelihood(data, kernel, self._named(centre + width * z))
            return value + 0.5 * float(z @ z), np.array([gradient[n] for n in names]) * width + z

        first = np.zeros(len(names))
        if start is not None:
            first = np.clip((np.log([getattr(start, name) for name in names]) - centre) / width, -3.0, 3.0)
        found = minimize(
            loss, first, jac=True, method="L-BFGS-B", bounds=[(-3.0, 3.0)] * len(names),
            options={"ftol": _TOLERANCE, "gtol": 0.03},
        )  # fmt: skip
        return self._named(centre + width * found.x), -float(found.fun)

    def _named(self, logarithms: Array) -> Hyperparameters:
        return Hyperparameters(**dict(zip(self.names, np.exp(logarithms).tolist(), strict=True)))

    def _negative_log_likelihood(
        self, data: Data, kernel: FittedKernel, hyper: Hyperparameters
    ) -> tuple[float, dict[str, float]]:
        """Return the value (up to a constant) and its gradient in the logarithm of each hyperparameter."""
        covariance, derivatives = kernel.at(hyper)
        noise = hyper.noise**2 / data.counts
        np.fill_diagonal(covariance, covariance.diagonal() + noise + data.extra + _JITTER)
        inverse, log_determinant = _inverted(covariance)
        ones = inverse.sum(1)
        total = float(ones.sum())
        # The constant's own estimate is taken out and its uncertainty counted: restricted maximum likelihood.
        expected = self._mean(hyper)[data.cells]
        residual = data.means - expected
        residual = residual - float(ones @ residual) / total
        weights = inverse @ residual
        repeats = float(np.sum(data.counts - 1))
        value = 0.5 * log_determinant + 0.5 * float(residual @ weights) + 0.5 * np.log(total)
        value += repeats * np.log(hyper.noise) + 0.5 * data.scatter / hyper.noise**2
        # Half the trace of the projected inverse times a change of the covariance, less the data's part.
        sensitivity = 0.5 * (inverse - np.outer(ones, ones) / total - np.outer(weights, weights))
        gradient = derivatives.by_logarithms(sensitivity)
        for name, edge in zip(("cliff_attn", "cliff_act"), self._edges, strict=True):
            gradient[name] += getattr(hyper, name) * float(weights @ edge[data.cells])
        gradient["noise"] = 2 * float(sensitivity.diagonal() @ noise) + repeats - data.scatter / hyper.noise**2
        return value, gradient


def _inverted(covariance: Array) -> tuple[Array, float]:
    """Return the inverse of a covariance and the logarithm of its determinant, by LAPACK's own two calls.

    Raises:
        LinAlgError: it is not positive definite.
    """
    factor, failed = dpotrf(covariance, lower=1, overwrite_a=1)
    if failed:
        raise np.linalg.LinAlgError("the covariance is not positive definite")
    log_determinant = 2 * float(np.log(factor.diagonal()).sum())
    inverse = np.tril(dpotri(factor, lower=1, overwrite_c=1)[0])
    inverse += np.tril(inverse, -1).T
    return inverse, log_determinant
