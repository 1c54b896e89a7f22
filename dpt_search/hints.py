"""Earlier surfaces that a search starts from: the elastic probe's, and those of earlier runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import RegularGridInterpolator
from scipy.signal import savgol_filter
from scipy.stats import theilslopes

from dpt_search.config import BadConfig, RunConfig
from dpt_search.kernel import levels_of, parts_of
from dpt_search.map_predictor import Array
from dpt_search.map_sampler import ratios
from dpt_search.posterior import Data, Hint, Surface
from dpt_search.probe_table import read_probe
from dpt_search.store import RunStore
from search_spaces.ratios import Cell, RatioSpace

PROBE_TRUST = 8.0
"""Of a probe: those of three real surfaces helped, and trials take it back where one does not. With less, first trials
that tell little blur what it knows. An earlier run is another matter: a surface of CIFAR-10, trusted as much, misleads
a search on Fashion-MNIST for long."""
ATTN_LEFT = 0.85
"""What of a probe's losses by attentions is expected to be left once a plan was trained alone."""
ACT_LEFT = 0.34
"""The same of large losses by activations, for a probe as long as a trial. What counts is the ratio of both: with a
tenth less the first decisions on the embedded surface are 0.1 points worse, with a tenth more those on the one of 24
blocks."""
ACT_LARGE = 0.1
"""A loss by activations, in units of accuracy, that counts as large."""
ACT_POWER = 0.75
"""Of smaller ones less is left, in proportion to this power of them; with 0.5 or 1 decisions differ by 0.02 points."""


def hints_of(store: RunStore, space: RatioSpace, config: RunConfig) -> list[Hint]:
    """Return what is known of the surface before its trials, the probe's first, [cells] each in the space's order.

    Args:
        store: the run's directory, whose probe counts if it has one.
        space: the lattice.
        config: its prior runs, and how long its trials are.

    Raises:
        BadConfig: a prior run has no surface.
        BadRun: the probe's table cannot be read.
    """
    probe = read_probe(store)
    own = []
    if probe is not None:
        length = probe.epochs / config.trial.epochs
        own.append(smooth(space, probe.cells, probe.accuracies, probe.losses, length))
    return own + [Hint(prior_surface(location, space)) for location in config.prior]


def smooth(space: RatioSpace, cells: Sequence[Cell], accuracies: Array, losses: Array | None, length: float) -> Hint:
    """Return the smooth surface through what a probe says of some cells, and how sure it is between them.

    Args:
        space: the lattice.
        cells: that the probe evaluated.
        accuracies: [cells], of each.
        losses: [cells], mean cross-entropy of each, in nats; None where that is not known.
        length: of the probe's training, in trials.
    """
    index = {cell: i for i, cell in enumerate(space)}
    said = accuracies if losses is None else by_loss(accuracies, losses)
    data = Data.of(np.array([index[cell] for cell in cells]), said)
    found = Surface(ratios(space), degree=0).posterior(data)
    return Hint(found.mean, found.covariance, PROBE_TRUST, trained_alone(found.mean, space, length), spread=1.0)


def trained_alone(surface: Array, space: RatioSpace, length: float) -> Array:
    """Return what is expected of plans that are trained alone where shared weights say so much, [cells of the space].

    Weights that all plans share cannot make up for what one of them lacks. Trained alone, a plan makes up for nearly
    all of a small loss by activations and for less of a large one, and for all that both lose beyond their sum. What
    shared weights gain without activations is not expected to last.

    Args:
        surface: [cells], accuracies.
        space: the lattice.
        length: of the shared weights' training, in trials.
    """
    levels = levels_of(ratios(space))
    by_attn, by_act, _ = parts_of(surface, *levels).T
    lost = np.maximum(by_act[0] - by_act, 0.0)
    share = ACT_LEFT * length * np.minimum(1.0, lost / ACT_LARGE) ** ACT_POWER
    return np.asarray(ATTN_LEFT * by_attn - np.minimum(1.0, share) * lost)


def by_loss(accuracies: Array, losses: Array) -> Array:
    """Return what the losses of cells say of their accuracies, [cells].

    A loss weighs every image by how far off it is, where an accuracy counts those that change sides: of as many images
    it tells a small difference with less noise, though not always more of what trained plans differ by. The
    straight line that makes accuracies of losses has the median slope between cells (Theil and Sen), which a few cells
    beyond a cliff do not bend.

    Args:
        accuracies: [cells].
        losses: [cells], mean cross-entropies.
    """
    if not np.isfinite(losses).all() or np.ptp(losses) == 0:
        return accuracies
    slope, intercept, *_ = theilslopes(accuracies, losses)
    return np.clip(intercept + slope * losses, 0.0, 1.0) if slope < 0 else accuracies


def prior_surface(location: str, space: RatioSpace) -> Array:
    """Return the surface that an earlier run believes in, at the same ratios, [cells of the space].

    The earlier model may have another number of units; what its single units do is left out.

    Raises:
        BadConfig: the run has no recommendation yet, or does not exist.
    """
    found = RunStore(location).read_json("recommendation.json")
    if found is None:
        raise BadConfig(f"prior {location!r} has no recommendation.json: name the directory of a run that has searched")
    surface = found["surface"]
    own = RatioSpace(surface["n_attn"], surface["n_act"])
    return carried_over(np.ravel(surface["mean"]), own, space)


def carried_over(surface: Array, own: RatioSpace, space: RatioSpace) -> Array:
    """Return what an earlier run's surface, [cells of `own`], says of another's, [cells of `space`]."""
    return without_steps(resampled(surface, own, space), space)


def resampled(surface: Array, own: RatioSpace, space: RatioSpace) -> Array:
    """Return a surface over one space, [cells of `own`], at the ratios of another, [cells of `space`]."""
    values, axes = surface.reshape(own.n_attn + 1, own.n_act + 1), []
    for axis in (0, 1):
        # A kind without units has one row, at ratio 0.
        values = values if values.shape[axis] > 1 else np.repeat(values, 2, axis=axis)
        axes.append(np.linspace(0, 1, values.shape[axis]))
    return np.asarray(RegularGridInterpolator(axes, values)(ratios(space)))


def without_steps(surface: Array, space: RatioSpace) -> Array:
    """Return an earlier run's surface without what its single units do, [cells of the space].

    Its ranking is of other units, so where that surface steps this one does not: each value becomes that of a straight
    line through the cells within a sixth of the range, along one kind and then the other. What lies beyond the last
    unit of a kind stays apart.
    """
    values = surface.reshape(space.n_attn + 1, space.n_act + 1).copy()
    for axis, units in enumerate((space.n_attn, space.n_act)):
        before_last = values if axis == 0 else values.T
        if width := 2 * round(units / 6):
            before_last[:units] = savgol_filter(before_last[:units], width + 1, polyorder=1, axis=0)
    return values.ravel()
