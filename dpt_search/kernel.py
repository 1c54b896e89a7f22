"""The prior covariance of a surface, part by part, and what it depends on. Arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dpt_search.map_predictor import Array


@dataclass(frozen=True)
class Hyperparameters:
    """What the model learns besides the surface itself; standard deviations are in units of accuracy (0 to 1).

    Attributes:
        slope: prior sd of the polynomial's coefficients of degree >= 1, over ratios from 0 to 1.
        hint: prior sd of each hint's coefficient about 1 for the first, about 0 for the others.
        shape: prior sd of the coefficients of each hint's parts.
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


@dataclass(frozen=True)
class Kernel:
    """The prior covariance of some cells, in parts.

    Attributes:
        outer: [k, k] each, outer products of the polynomial's terms and of the hints.
        squared: [2, k, k] squared distances along each axis.
        edges: [2, k], 1 where a kind has no unit left.
    """

    outer: dict[str, Array]
    squared: Array
    edges: Array

    def at(self, cells: np.ndarray) -> Kernel:
        """Return the kernel of some of the cells."""
        some = np.ix_(cells, cells)
        outer = {name: each[some] for name, each in self.outer.items()}
        return Kernel(outer, self.squared[:, some[0], some[1]], self.edges[:, cells])

    @cached_property
    def _both_beyond(self) -> Array:
        """[2, k, k], 1 where both cells lie beyond the same cliff."""
        return self.edges[:, :, None] * self.edges[:, None, :]

    def parts(self, sd: dict[str, float]) -> tuple[dict[str, Array], Array]:
        """Return what each part adds, [k, k] each, and the sum's derivative by the logarithm of the length scale.

        Args:
            sd: fields of `Hyperparameters`.
        """
        parts = {name: sd[name] ** 2 * each for name, each in self.outer.items()}
        scaled = self.squared / sd["length"] ** 2
        attn, act = np.exp(-0.5 * scaled)
        by_attn, by_act = attn * scaled[0], act * scaled[1]
        parts["single"] = sd["single"] ** 2 * (attn + act)
        parts["joint"] = sd["joint"] ** 2 * attn * act
        change = sd["single"] ** 2 * (by_attn + by_act) + parts["joint"] * (scaled[0] + scaled[1])
        along = {"cliff_attn": (act, by_act), "cliff_act": (attn, by_attn)}
        for both, (name, (other, by_other)) in zip(self._both_beyond, along.items(), strict=True):
            # Half of the fall is the same all along the edge, the other half changes smoothly.
            half = (sd[name] / 3) ** 2 / 2 * both
            parts[name] = half * (1 + other)
            change += half * by_other
        return parts, change


def squared_distances(level: np.ndarray) -> Array:
    """Return [cells, cells] squared distances along one axis, in the logarithm of what is left, over 0 to 1."""
    most = int(level.max())
    place = 1 - np.log(most + 1 - level) / np.log(most + 1) if most else np.zeros(len(level))
    return (place[:, None] - place[None, :]) ** 2


def parts_of(hint: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """Return [cells, 3]: a hint's mean over each row, over each column, and what they leave."""
    centred = hint - hint.mean()
    by_row, by_column = ((np.bincount(level, centred) / np.bincount(level))[level] for level in (rows, columns))
    return np.stack([by_row, by_column, centred - by_row - by_column], axis=1)
