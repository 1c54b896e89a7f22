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

A hint is an earlier surface, such as the elastic probe's. Its coefficient is learnt, from 1 on for the first hint and
from 0 on for others, and so is one each for its mean over rows, its mean over columns and what they leave, because one
kind of unit may recover better than the hint knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize

from dpt_search.kernel import Hyperparameters, Kernel, parts_of, squared_distances
from dpt_search.map_predictor import Array, monomials

_JITTER = 1e-10
_TOLERANCE = 1e-5
"""Relative change of the likelihood at which its maximum counts as found."""
_FIT_CELLS = 48
"""Observed cells that the hyperparameters are learnt from, at most: more make them no better and take longer."""


_WIDTH = {
    "slope": 1.0, "hint": 0.7, "shape": 1.0, "step": 0.7, "own": 0.5, "single": 1.0, "joint": 1.0, "length": 0.4,
    "cliff_attn": 1.0, "cliff_act": 1.0, "noise": 0.5,
}  # fmt: skip
"""Priors are log-normal: their medians are the defaults, and these the sd of the logarithms."""
_HINTED = {"slope": 0.05, "single": 0.02, "joint": 0.007, "cliff_attn": 0.03, "cliff_act": 0.02}
"""Medians where there are hints: what these leave to explain is smaller."""


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

    def thinned(self, most: int) -> Data:
        """Return at most so many of the cells, evenly taken from all."""
        if len(self.cells) <= most:
            return self
        kept = np.linspace(0, len(self.cells) - 1, most).round().astype(int)
        share = float(np.sum(self.counts[kept] - 1) / max(1.0, np.sum(self.counts - 1)))
        return Data(self.cells[kept], self.means[kept], self.counts[kept], share * self.scatter)


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
        if len(cells) == 0:
            return self
        columns = self.covariance[:, cells]
        lower = np.linalg.cholesky(columns[cells] + np.diag(np.full(len(cells), self.noise**2)))
        known = solve_triangular(lower, columns.T, lower=True)
        return Posterior(self.mean, self.covariance - known.T @ known, self.noise)


class Surface:
    """The model over one lattice."""

    def __init__(self, points: Array, degree: int = 2, hints: Sequence[Array] = ()) -> None:
        """
        Args:
            points: [cells, 2], the ratios of every cell of a full lattice.
            degree: total degree of the polynomial; 0 leaves a constant mean.
            hints: [cells] each, earlier surfaces, in units of accuracy.
        """
        points = np.asarray(points, dtype=np.float64)
        levels = [np.unique(points[:, axis], return_inverse=True)[1] for axis in (0, 1)]
        features = {}
        if degree:
            features["slope"] = monomials(points, degree)[:, 1:]
        if hints:
            features["hint"] = np.stack([hint - hint.mean() for hint in hints], axis=1)
            features["shape"] = np.concatenate([parts_of(hint, *levels) for hint in hints], axis=1)
        self._hinted = hints[0] - hints[0].mean() if hints else np.zeros(len(points))
        self._edges = np.stack([(level == level.max()) & (level > 0) for level in levels]).astype(np.float64)
        outer = {name: each @ each.T for name, each in features.items()}
        outer["step"] = np.sum([np.minimum(level[:, None], level[None, :]) for level in levels], axis=0).astype(float)
        outer["own"] = np.eye(len(points))
        self._kernel = Kernel(outer, np.stack([squared_distances(level) for level in levels]), self._edges)
        self.names = (*outer, "single", "joint", "length", "cliff_attn", "cliff_act", "noise")

    def prior(self, hyper: Hyperparameters) -> Array:
        """Return the prior covariance of all cells' accuracies without the constant, [cells, cells]."""
        return np.sum(list(self._kernel.parts(asdict(hyper))[0].values()), axis=0)

    def _mean(self, hyper: Hyperparameters) -> Array:
        """Return the prior mean of all cells without the constant, [cells]."""
        return self._hinted - hyper.cliff_attn * self._edges[0] - hyper.cliff_act * self._edges[1]

    def posterior(self, data: Data, hyper: Hyperparameters | None = None) -> Posterior:
        """Return the posterior of all cells.

        Args:
            data: at least one observation.
            hyper: fixed hyperparameters; None learns them by `fit`.
        """
        hyper = hyper or self.fit(data)[0]
        prior = self.prior(hyper)
        across = prior[data.cells]
        lower = np.linalg.cholesky(across[:, data.cells] + np.diag(hyper.noise**2 / data.counts + _JITTER))
        half = solve_triangular(lower, across, lower=True)
        ones = solve_triangular(lower, np.ones(len(data.cells)), lower=True)
        expected = self._mean(hyper)
        seen = solve_triangular(lower, data.means - expected[data.cells], lower=True)
        # The constant has a flat prior: its generalised least-squares estimate, and what that leaves uncertain.
        precision = float(ones @ ones)
        constant = float(ones @ seen) / precision
        unexplained = 1 - half.T @ ones
        mean = expected + constant + half.T @ (seen - constant * ones)
        covariance = prior - half.T @ half + np.outer(unexplained, unexplained) / precision
        return Posterior(mean, covariance, hyper.noise)

    def fit(self, data: Data) -> tuple[Hyperparameters, float]:
        """Return the hyperparameters with the highest marginal likelihood times prior, and its logarithm.

        The constant is integrated out; the logarithm leaves out what is the same for every model of the same data.
        """
        data = data.thinned(_FIT_CELLS)
        kernel = self._kernel.at(data.cells)
        default, names = asdict(Hyperparameters()) | (_HINTED if "hint" in self.names else {}), self.names
        centre = np.log([default[name] for name in names])
        width = np.array([_WIDTH[name] for name in names])

        def loss(z: Array) -> tuple[float, Array]:
            value, gradient = self._negative_log_likelihood(data, kernel, self._named(centre + width * z))
            return value + 0.5 * float(z @ z), np.array([gradient[n] for n in names]) * width + z

        found = minimize(
            loss, np.zeros(len(names)), jac=True, method="L-BFGS-B", bounds=[(-3.0, 3.0)] * len(names),
            options={"ftol": _TOLERANCE, "gtol": 0.03},
        )  # fmt: skip
        return self._named(centre + width * found.x), -float(found.fun)

    def _named(self, logarithms: Array) -> Hyperparameters:
        return Hyperparameters(**dict(zip(self.names, np.exp(logarithms).tolist(), strict=True)))

    def _negative_log_likelihood(
        self, data: Data, kernel: Kernel, hyper: Hyperparameters
    ) -> tuple[float, dict[str, float]]:
        """Return the value (up to a constant) and its gradient in the logarithm of each hyperparameter."""
        parts, by_length = kernel.parts(asdict(hyper))
        noise = hyper.noise**2 / data.counts
        lower = np.linalg.cholesky(np.sum(list(parts.values()), axis=0) + np.diag(noise + _JITTER))
        inverse = cho_solve((lower, True), np.eye(len(data.cells)))
        ones = inverse.sum(1)
        total = float(ones.sum())
        # The constant's own estimate is taken out and its uncertainty counted: restricted maximum likelihood.
        expected = self._mean(hyper)[data.cells]
        residual = data.means - expected
        residual = residual - float(ones @ residual) / total
        weights = inverse @ residual
        repeats = float(np.sum(data.counts - 1))
        value = float(np.log(np.diag(lower)).sum()) + 0.5 * float(residual @ weights) + 0.5 * np.log(total)
        value += repeats * np.log(hyper.noise) + 0.5 * data.scatter / hyper.noise**2
        # Half the trace of the projected inverse times a change of the covariance, less the data's part.
        sensitivity = 0.5 * (inverse - np.outer(ones, ones) / total - np.outer(weights, weights))
        gradient = {name: 2 * float(np.vdot(sensitivity, part)) for name, part in parts.items()}
        for name, edge in zip(("cliff_attn", "cliff_act"), self._edges, strict=True):
            gradient[name] += getattr(hyper, name) * float(weights @ edge[data.cells])
        gradient["length"] = float(np.vdot(sensitivity, by_length))
        gradient["noise"] = 2 * float(np.diag(sensitivity) @ noise) + repeats - data.scatter / hyper.noise**2
        return value, gradient
