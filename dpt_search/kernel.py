"""The prior covariance of a surface, and what it depends on. Arrays in, arrays out.

Every part is separable or has few features, so it is made of matrices over the levels of one kind: on 25 x 25 cells
these have 25 x 25 entries where the covariance has 625 x 625.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpt_search.map_predictor import Array


@dataclass(frozen=True)
class Hyperparameters:
    """What the model learns besides the surface itself; standard deviations are in units of accuracy (0 to 1).

    Attributes:
        slope: prior sd of the polynomial's coefficients of degree >= 1, over ratios from 0 to 1.
        hint: prior sd of each hint's coefficient about what is expected of the first, about 0 for the others.
        shape: prior sd of the coefficients of each hint's parts, times the hint's `spread`.
        step: sd of the loss by each single unit, about what the smooth parts say.
        own: sd of what a cell has to itself: its accuracy, not its trials' noise.
        single: sd of the residual's function of one kind.
        joint: sd of its function of both kinds.
        length: length scale of both, where 1 is the way from all units to none.
        cliff_attn: expected loss without any attention; its sd is a third of that.
        cliff_act: the same without any activation.
        noise: sd of one trial about its cell's true accuracy.
    """

    slope: float = 0.2
    hint: float = 0.3
    shape: float = 0.2
    step: float = 0.002
    own: float = 0.002
    single: float = 0.05
    joint: float = 0.02
    length: float = 0.5
    cliff_attn: float = 0.3
    cliff_act: float = 0.03
    noise: float = 0.004

    def cliff_variances(self) -> tuple[float, float]:
        """Return half of the variance of each kind's cliff: one half is the same all along it."""
        return (self.cliff_attn / 3) ** 2 / 2, (self.cliff_act / 3) ** 2 / 2


class Kernel:
    """The prior covariance between the cells of one lattice."""

    def __init__(self, levels: np.ndarray, features: dict[str, Array], given: Array | None = None) -> None:
        """
        Args:
            levels: [2, cells] number of units of each kind that every cell removes.
            features: [cells, terms] by the hyperparameter that is the prior sd of their coefficients.
            given: [cells, cells] covariance of a part that has nothing to be learnt; None for none.
        """
        self.levels, self.features, self.given = levels, features, given
        most = levels.max(axis=1)
        self.squared = [squared_distances(n) for n in most]
        self.shared = [np.minimum.outer(np.arange(n + 1.0), np.arange(n + 1.0)) for n in most]
        self.beyond = [_last_with_itself(n) for n in most]

    def between(self, hyper: Hyperparameters, rows: np.ndarray, columns: np.ndarray) -> Array:
        """Return the covariance of some cells with others, [rows, columns]."""
        near = [np.exp(-0.5 / hyper.length**2 * squared) for squared in self.squared]
        cliffs = hyper.cliff_variances()
        alone = [
            hyper.single**2 * near[axis] + hyper.step**2 * self.shared[axis] + cliffs[axis] * self.beyond[axis]
            for axis in (0, 1)
        ]
        attn, act = (np.ix_(level[rows], level[columns]) for level in self.levels)
        found = alone[0][attn] + alone[1][act]
        found += (hyper.joint**2 * near[0] + cliffs[0] * self.beyond[0])[attn] * near[1][act]
        found += near[0][attn] * (cliffs[1] * self.beyond[1])[act]
        for name, each in self.features.items():
            found += (getattr(hyper, name) ** 2 * each[rows]) @ each[columns].T
        found += hyper.own**2 * (rows[:, None] == columns[None, :])
        if self.given is not None:
            found += self.given[np.ix_(rows, columns)]
        return found


class FittedKernel:
    """The covariance of a few cells and its derivatives, over and over with other hyperparameters."""

    def __init__(self, kernel: Kernel, cells: np.ndarray) -> None:
        attn, act = (np.ix_(level[cells], level[cells]) for level in kernel.levels)
        fixed = {name: each[cells] @ each[cells].T for name, each in kernel.features.items()}
        fixed["step"] = kernel.shared[0][attn] + kernel.shared[1][act]
        fixed["own"] = (cells[:, None] == cells[None, :]).astype(np.float64)
        self.squared = kernel.squared[0][attn], kernel.squared[1][act]
        self.beyond = kernel.beyond[0][attn], kernel.beyond[1][act]
        self.given = 0.0 if kernel.given is None else kernel.given[np.ix_(cells, cells)]
        self.names = tuple(fixed)
        self.fixed = np.stack([*fixed.values(), *self.beyond]).reshape(len(fixed) + 2, -1)

    def at(self, hyper: Hyperparameters) -> tuple[Array, FittedGradient]:
        """Return the covariance, [cells, cells], and what its derivatives follow from."""
        scale = -0.5 / hyper.length**2
        near = np.exp(scale * self.squared[0]), np.exp(scale * self.squared[1])
        variances = np.array([*(getattr(hyper, name) ** 2 for name in self.names), *hyper.cliff_variances()])
        single, joint = near[0] + near[1], near[0] * near[1]
        # What changes smoothly along each cliff.
        along = self.beyond[0] * near[1], self.beyond[1] * near[0]
        total = (variances @ self.fixed).reshape(joint.shape) + self.given
        total += hyper.single**2 * single + hyper.joint**2 * joint + variances[-2] * along[0] + variances[-1] * along[1]
        return total, FittedGradient(self, hyper, variances, near, single, joint, along)


@dataclass(frozen=True)
class FittedGradient:
    """What the derivatives of a covariance follow from; see `FittedKernel`."""

    kernel: FittedKernel
    hyper: Hyperparameters
    variances: Array
    near: tuple[Array, Array]
    single: Array
    joint: Array
    along: tuple[Array, Array]

    def by_logarithms(self, sensitivity: Array) -> dict[str, float]:
        """Return the derivative of a value by the logarithm of each hyperparameter but the noise.

        Args:
            sensitivity: [cells, cells] the value's derivative by the entries of the covariance, symmetric.
        """
        kernel, hyper, near = self.kernel, self.hyper, self.near
        fixed = 2 * self.variances * (kernel.fixed @ sensitivity.ravel())
        found = dict(zip((*kernel.names, "cliff_attn", "cliff_act"), fixed.tolist(), strict=True))
        for name, variance, along in zip(("cliff_attn", "cliff_act"), self.variances[-2:], self.along, strict=True):
            found[name] += 2 * float(variance) * float(np.vdot(sensitivity, along))
        found["single"] = 2 * hyper.single**2 * float(np.vdot(sensitivity, self.single))
        found["joint"] = 2 * hyper.joint**2 * float(np.vdot(sensitivity, self.joint))
        by_attn = kernel.squared[0] * (
            hyper.single**2 * near[0] + hyper.joint**2 * self.joint + self.variances[-1] * self.along[1]
        )
        by_act = kernel.squared[1] * (
            hyper.single**2 * near[1] + hyper.joint**2 * self.joint + self.variances[-2] * self.along[0]
        )
        found["length"] = float(np.vdot(sensitivity, by_attn + by_act)) / hyper.length**2
        return found


def squared_distances(most: int) -> Array:
    """Return [levels, levels] squared distances along one axis, in the logarithm of what is left, over 0 to 1.

    Args:
        most: the highest level: all units of the kind are removed there.
    """
    place = 1 - np.log(most + 1 - np.arange(most + 1.0)) / np.log(most + 1) if most else np.zeros(1)
    return (place[:, None] - place[None, :]) ** 2


def _last_with_itself(most: int) -> Array:
    """Return [levels, levels], 1 where both levels leave no unit of a kind that has some."""
    found = np.zeros((most + 1, most + 1))
    found[-1, -1] = float(most > 0)
    return found


def levels_of(points: Array) -> np.ndarray:
    """Return the number of units of each kind that every cell removes, [2, cells].

    Args:
        points: [cells, 2], the ratios of every cell of a full lattice.
    """
    return np.stack([np.unique(points[:, axis], return_inverse=True)[1] for axis in (0, 1)])


def parts_of(hint: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """Return [cells, 3]: a hint's mean over each row, over each column, and what they leave."""
    centred = hint - hint.mean()
    by_row, by_column = ((np.bincount(level, centred) / np.bincount(level))[level] for level in (rows, columns))
    return np.stack([by_row, by_column, centred - by_row - by_column], axis=1)
