"""Earlier surfaces that a search starts from: the elastic probe's, and those of earlier runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import RegularGridInterpolator
from scipy.signal import savgol_filter
from scipy.stats import theilslopes

from dpt_search.config import BadConfig
from dpt_search.map_predictor import Array
from dpt_search.map_sampler import ratios
from dpt_search.posterior import Data, Hint, Surface
from dpt_search.probe_table import read_probe
from dpt_search.store import RunStore
from search_spaces.ratios import Cell, RatioSpace

PROBE_TRUST = 8.0
"""Of a probe: those of two real surfaces of three helped, and trials take it back where one does not. With less,
first trials that tell little blur what it knows. An earlier run is another matter: a surface of CIFAR-10, trusted as
much, misleads a search on Fashion-MNIST for long."""
PROBE_PARTS = (0.85, 0.3, 0.2)
"""What of a probe's losses by attentions, by activations (for each of its epochs, up to all of them), and by both at
once beyond their sum, is left once a plan was trained alone: rounded from what was left on three real surfaces; on the
one of 24 blocks as it is now it is 0.6, 0.2 and 0.4 (`benchmarks/probe_worth.py`). Weights that all plans share cannot
make up for what one of them lacks, least of all where it lacks much of both kinds."""


def hints_of(store: RunStore, space: RatioSpace, priors: Sequence[str] = ()) -> list[Hint]:
    """Return what is known of the surface before its trials, the probe's first, [cells] each in the space's order.

    Args:
        store: the run's directory, whose probe counts if it has one.
        space: the lattice.
        priors: directories of earlier runs.

    Raises:
        BadConfig: a prior run has no surface.
        BadRun: the probe's table cannot be read.
    """
    probe = read_probe(store)
    own = [] if probe is None else [smooth(space, probe.cells, probe.accuracies, probe.losses, probe.epochs)]
    return own + [Hint(prior_surface(location, space)) for location in priors]


def smooth(space: RatioSpace, cells: Sequence[Cell], accuracies: Array, losses: Array | None, epochs: int) -> Hint:
    """Return the smooth surface through what a probe says of some cells, and how sure it is between them.

    Args:
        space: the lattice.
        cells: that the probe evaluated.
        accuracies: [cells], of each.
        losses: [cells], mean cross-entropy of each, in nats; None where that is not known.
        epochs: of the probe's training.
    """
    index = {cell: i for i, cell in enumerate(space)}
    said = accuracies if losses is None else by_loss(accuracies, losses)
    data = Data.of(np.array([index[cell] for cell in cells]), said)
    found = Surface(ratios(space), degree=0).posterior(data)
    by_attn, by_act, by_both = PROBE_PARTS
    parts = by_attn, min(1.0, by_act * epochs), by_both
    return Hint(found.mean, found.covariance, PROBE_TRUST, parts, spread=1.0)


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
