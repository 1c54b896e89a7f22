"""Earlier surfaces that a search starts from: the elastic probe's, and those of earlier runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import RegularGridInterpolator

from dpt_search.config import BadConfig
from dpt_search.map_predictor import Array
from dpt_search.map_sampler import ratios
from dpt_search.posterior import Data, Surface
from dpt_search.probe_table import read_probe
from dpt_search.store import RunStore
from search_spaces.ratios import Cell, RatioSpace


def hints_of(store: RunStore, space: RatioSpace, priors: Sequence[str] = ()) -> list[Array]:
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
    own = [] if probe is None else [smooth(space, probe.cells, probe.accuracies)]
    return own + [prior_surface(location, space) for location in priors]


def smooth(space: RatioSpace, cells: Sequence[Cell], accuracies: Array) -> Array:
    """Return the smooth surface through the accuracies of some cells, [cells of the space]."""
    index = {cell: i for i, cell in enumerate(space)}
    data = Data.of(np.array([index[cell] for cell in cells]), accuracies)
    return Surface(ratios(space), degree=0).posterior(data).mean


def prior_surface(location: str, space: RatioSpace) -> Array:
    """Return the surface that an earlier run believes in, at the same ratios, [cells of the space].

    The earlier model may have another number of units.

    Raises:
        BadConfig: the run has no recommendation yet, or does not exist.
    """
    found = RunStore(location).read_json("recommendation.json")
    if found is None:
        raise BadConfig(f"prior {location!r} has no recommendation.json: name the directory of a run that has searched")
    surface, values = found["surface"], np.array(found["surface"]["mean"])
    axes = []
    for axis, units in enumerate((surface["n_attn"], surface["n_act"])):
        # A kind without units has one row, at ratio 0.
        values = values if units else np.repeat(values, 2, axis=axis)
        axes.append(np.linspace(0, 1, values.shape[axis]))
    return np.asarray(RegularGridInterpolator(axes, values)(ratios(space)))
