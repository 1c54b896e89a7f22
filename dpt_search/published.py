"""What HetDPT published: its samples of DeiT-B, and what its noise study found.

Source: "Rethinking Depth Pruning for ViTs: A Heterogeneity-Aware Perspective" (PMLR v306).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass

import numpy as np

from dpt_search.map_predictor import Array, MapPredictor
from dpt_search.robustness import POINT, Noise, Samples
from search_spaces.goals import unit_goals
from search_spaces.ratios import Cell, RatioSpace
from trainables.locations import read_bytes

_SAMPLES = "package:dpt_search/embedded/hetdpt/deit_b_imagenet_samples.csv"


@dataclass(frozen=True)
class Preset:
    """The settings of a study that was published, and what it found.

    Attributes:
        noises: what is known of its noise.
        shares: published shares of draws with the same decision, one layer off, and more.
    """

    noises: tuple[Noise, ...]
    shares: tuple[float, float, float]


PRESETS = {"hetdpt": Preset((Noise(0.1 * POINT), Noise(0.316 * POINT, 0.5 * POINT)), (0.750, 0.052, 0.198))}
"""Source: HetDPT, "Rethinking Depth Pruning for ViTs: A Heterogeneity-Aware Perspective" (PMLR v306)."""


def published_samples() -> Samples:
    """Return HetDPT's samples of DeiT-B on ImageNet-1k, decided by as published: a polynomial of degree 2."""
    space, (cells, accuracies) = RatioSpace(12, 12), published()
    points, everywhere = (np.array([space.ratios(cell) for cell in each]) for each in (cells, space))

    def believe(disturbed: Array) -> tuple[Array, float]:
        predictor = MapPredictor(points, disturbed, degree=2)
        return predictor.predict(everywhere)[0], predictor.sd

    return Samples("HetDPT's samples of DeiT-B", space, unit_goals(space, 4, 6, 8, 10), accuracies, believe)


def published() -> tuple[list[Cell], Array]:
    """Return the cells and the accuracies, [22], of the samples that HetDPT published."""
    lines = [line for line in read_bytes(_SAMPLES).decode().splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    cells = [Cell(int(row["n_attn"]), int(row["n_act"])) for row in rows]
    return cells, np.array([float(row["accuracy"]) for row in rows]) * POINT
