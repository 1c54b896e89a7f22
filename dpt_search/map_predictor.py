"""MAP, the published Model Accuracy Predictor: a polynomial of the two ratios, its degree by leave-2-out.

Source: HetDPT, "Rethinking Depth Pruning for ViTs: A Heterogeneity-Aware Perspective" (PMLR v306).
Arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

DEGREES = (1, 2, 3, 4)
_TOLERANCE = 1e-8
"""Below this a determinant counts as zero: the samples that are left do not fix the polynomial."""


class NotIdentified(ValueError):
    """The samples do not determine a polynomial of this degree; the message says what is missing."""


def exponents(degree: int) -> list[tuple[int, int]]:
    """Return the powers of (x, y) of every term, by total degree: 1, x, y, x^2, xy, y^2, ..."""
    return [(total - j, j) for total in range(degree + 1) for j in range(total + 1)]


def monomials(points: Array, degree: int) -> Array:
    """Return every term of a polynomial of total degree `degree` at `points`.

    Args:
        points: [n, 2].
        degree: total degree.

    Returns:
        [n, terms], in the order of `exponents`.
    """
    points = np.asarray(points, dtype=np.float64)
    return np.stack([points[:, 0] ** i * points[:, 1] ** j for i, j in exponents(degree)], axis=1)


class MapPredictor:
    """Least-squares polynomial of total degree 1 to 4 in the two ratios.

    Attributes:
        degree: total degree, as given or as leave-2-out chose it.
        coefficients: [terms], in the order of `exponents`.
        leave_2_out: root mean squared error by degree, for the degrees that were tried; nan where some pair, left out,
            leaves the polynomial undetermined: a figure would depend on the solver.
        sd: standard deviation of the residuals; nan without a degree of freedom.
    """

    def __init__(self, points: Array, accuracies: Array, degree: int | None = None) -> None:
        """Fit.

        Args:
            points: [n, 2], ratios of the samples, pruned or retained.
            accuracies: [n].
            degree: total degree; None chooses the one with the least leave-2-out error.

        Raises:
            NotIdentified: the samples do not determine the polynomial.
        """
        points, accuracies = np.asarray(points, dtype=np.float64), np.asarray(accuracies, dtype=np.float64)
        tried: Sequence[int] = DEGREES if degree is None else (degree,)
        self.leave_2_out = {d: leave_2_out(points, accuracies, d) for d in tried}
        self.degree = degree if degree is not None else _least(self.leave_2_out)
        features = monomials(points, self.degree)
        samples, terms = features.shape
        if np.linalg.matrix_rank(features) < terms:
            raise NotIdentified(
                f"{samples} samples do not determine the {terms} coefficients of a polynomial of degree "
                f"{self.degree}: sample more cells, off the lines that are there, or choose a lower degree"
            )
        self.coefficients = np.linalg.lstsq(features, accuracies, rcond=None)[0]
        residuals = accuracies - features @ self.coefficients
        freedom = samples - terms
        self.sd = float(np.sqrt(residuals @ residuals / freedom)) if freedom else float("nan")
        self._precision = features.T @ features

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return predictions and their standard errors (of the mean, not of one more sample), [m] each."""
        features = monomials(points, self.degree)
        leverage = np.einsum("ij,ij->i", features, np.linalg.solve(self._precision, features.T).T)
        return features @ self.coefficients, self.sd * np.sqrt(np.maximum(leverage, 0.0))


def leave_2_out(points: Array, accuracies: Array, degree: int) -> float:
    """Return the root mean squared error of predicting every pair of samples from all others.

    With residuals e and hat matrix H of the one fit to all samples, the errors of a left-out pair S are
    (I - H_SS)^-1 e_S: no refits.

    Args:
        points: [n, 2].
        accuracies: [n].
        degree: total degree.

    Returns:
        The error; nan when leaving some pair out leaves the polynomial undetermined.
    """
    features = monomials(points, degree)
    samples, terms = features.shape
    if samples < terms + 2:
        return float("nan")
    orthogonal, triangle = np.linalg.qr(features)
    scale = np.abs(np.diag(triangle))
    if scale.min() < _TOLERANCE * scale.max():
        return float("nan")
    left = np.eye(samples) - orthogonal @ orthogonal.T
    residuals = left @ accuracies
    i, j = np.triu_indices(samples, 1)
    determinant = left[i, i] * left[j, j] - left[i, j] ** 2
    if determinant.min() < _TOLERANCE:
        return float("nan")
    error_i = (left[j, j] * residuals[i] - left[i, j] * residuals[j]) / determinant
    error_j = (left[i, i] * residuals[j] - left[i, j] * residuals[i]) / determinant
    return float(np.sqrt(np.mean((error_i**2 + error_j**2) / 2)))


def _least(errors: dict[int, float]) -> int:
    identified = {degree: error for degree, error in errors.items() if np.isfinite(error)}
    if not identified:
        raise NotIdentified(
            "no degree is determined by every subset of the samples with two left out: "
            "sample more cells, or give the degree"
        )
    return min(identified, key=lambda degree: identified[degree])
