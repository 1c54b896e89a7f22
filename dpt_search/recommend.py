"""From observations to decisions: the surface with its uncertainty, and per budget the cell that is believed best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpt_search.blend import Blend
from dpt_search.map_predictor import Array
from dpt_search.map_sampler import ratios
from dpt_search.posterior import Data, Hint, Posterior
from search_spaces.goals import Goal
from search_spaces.plan import PruningPlan
from search_spaces.ratios import Cell, RatioSpace

_DRAWS = 4000
_Z95 = 1.96


@dataclass(frozen=True)
class Observation:
    """One finished trial as the searcher sees it.

    Attributes:
        plan: the units removed.
        start: what its weights started from.
        accuracy: of the last epoch, on val.
        cost: images processed times MACs.
    """

    plan: PruningPlan
    start: str
    accuracy: float
    cost: float


@dataclass(frozen=True)
class Recommendation:
    """The cell with the best posterior mean on a budget's line, or front.

    Attributes:
        budget: what it meets.
        cell: how many units of each kind go.
        mean: posterior mean of a trial's accuracy on val.
        sd: its posterior standard deviation.
        low: lower end of the 95 % credible interval.
        high: upper end.
        probability_best: posterior probability that no other cell of the budget is better.
        status: `predicted`, `observed` (its cell has a finished trial) or `confirmed` (at least two).
    """

    budget: Goal
    cell: Cell
    mean: float
    sd: float
    low: float
    high: float
    probability_best: float
    status: str


def recommend(
    space: RatioSpace,
    budgets: Sequence[Goal],
    observations: Sequence[Observation],
    hints: Sequence[Hint] = (),
    dense: float | None = None,
) -> tuple[dict[str, Any], list[Recommendation]]:
    """Decide every budget from what was observed.

    Args:
        space: the lattice.
        budgets: what is to be decided, each with the cells it is decided among.
        observations: at least one finished trial.
        hints: earlier surfaces.
        dense: the dense model's accuracy; None where it is not known.

    Returns:
        The surface as plain data (`n_attn`, `n_act`, and `mean` and `sd` as rows of n_attn and columns of n_act), and
        one recommendation per budget; `noise` is the
        learnt standard deviation of one trial about its cell's true accuracy.

    Raises:
        ValueError: nothing was observed.
    """
    if not observations:
        raise ValueError("nothing was observed yet")
    cells = [each.plan.cell for each in observations]
    found = beliefs(space, cells, np.array([each.accuracy for each in observations]), hints, dense)
    trials, index = Counter(cells), {cell: i for i, cell in enumerate(space)}
    surface = {
        "n_attn": space.n_attn,
        "n_act": space.n_act,
        "mean": _rows(found.mean, space),
        "sd": _rows(found.sd, space),
        "noise": found.noise,
    }
    return surface, [_decide(budget, index, found, trials) for budget in budgets]


def beliefs(
    space: RatioSpace,
    cells: Sequence[Cell],
    accuracies: Array,
    hints: Sequence[Hint] = (),
    dense: float | None = None,
) -> Posterior:
    """Return what is believed of every cell, in the space's order: the one model that all decisions are made by.

    Args:
        space: the lattice.
        cells: of the trials, at least one.
        accuracies: [trials].
        hints: earlier surfaces.
        dense: the dense model's accuracy; None where it is not known.
    """
    index = {cell: i for i, cell in enumerate(space)}
    data = Data.of(np.array([index[cell] for cell in cells]), accuracies)
    return Blend(ratios(space), hints=hints, dense=dense).posterior(data)


def _decide(budget: Goal, index: dict[Cell, int], beliefs: Posterior, trials: Counter[Cell]) -> Recommendation:
    line = np.array([index[cell] for cell in budget.cells])
    best = int(np.argmax(beliefs.mean[line]))
    mean, sd = float(beliefs.mean[line[best]]), float(beliefs.sd[line[best]])
    return Recommendation(
        budget=budget,
        cell=budget.cells[best],
        mean=mean,
        sd=sd,
        low=max(0.0, mean - _Z95 * sd),
        high=min(1.0, mean + _Z95 * sd),
        probability_best=_probability_best(beliefs.mean[line], beliefs.covariance[np.ix_(line, line)], best),
        status=("predicted", "observed", "confirmed")[min(2, trials[budget.cells[best]])],
    )


def _probability_best(mean: Array, covariance: Array, candidate: int) -> float:
    """Return how often the candidate is the best in joint draws from the posterior (a fixed seed)."""
    values, vectors = np.linalg.eigh(covariance)
    spread = vectors * np.sqrt(np.maximum(values, 0.0))
    draws = mean + np.random.default_rng(0).standard_normal((_DRAWS, len(mean))) @ spread.T
    return float(np.mean(draws.argmax(axis=1) == candidate))


def _rows(values: Array, space: RatioSpace) -> list[list[float]]:
    rows: list[list[float]] = values.reshape(space.n_attn + 1, space.n_act + 1).tolist()
    return rows
