"""MapSampler: what to try next, as an Optuna sampler."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from dpt_search.blend import Blend
from dpt_search.knowledge_gradient import knowledge_gradient
from dpt_search.map_predictor import Array
from dpt_search.posterior import Data, Hint, Posterior
from search_spaces.goals import Goal
from search_spaces.ratios import Cell, RatioSpace

PARAMETERS = ("n_attn", "n_act")
_INDIFFERENT = 1e-9
"""A knowledge gradient below this, in units of accuracy: no single trial is expected to change a decision."""


class MapSampler(BaseSampler):
    """Proposes the feasible cell whose trial is worth most to the decisions asked for, per unit of cost.

    The worth is the knowledge gradient summed over the budgets, averaged over the models of the blend of polynomial,
    hints and observations (see `posterior` and `blend`). Trials that still run count as if they ended as predicted,
    those of other workers that have no cell yet as if they were given theirs now. The study's objective is the
    accuracy, to be maximised, or a loss, to be minimised; an infinite one counts as a failure. Its parameters are
    `n_attn` and `n_act`; others are left to chance.

    A proposal is a function of the trials of the study and of the hints alone: no randomness, no state of its own.
    """

    def __init__(
        self,
        space: RatioSpace,
        budgets: Sequence[Goal],
        cost: Callable[[Cell], float] = lambda cell: 1.0,
        degree: int = 2,
        design: str = "lines",
        hints: Callable[[], Sequence[Hint]] = tuple,
        dense: float | None = None,
    ) -> None:
        """
        Args:
            space: the lattice.
            budgets: what the search has to decide, each with the cells it is decided among.
            cost: of one trial of a cell, in any unit.
            degree: total degree of the polynomial mean; 0 leaves a constant one.
            design: name in `DESIGNS` of what to try first; of `lines` the first cell alone where `dense` is known.
            hints: asked before every proposal for the earlier surfaces there are by now; there may come more.
            dense: the dense model's accuracy, or less its loss, which is nearly that of a trial without removals; None
                where it is not known.
        """
        self._space = space
        self._cells = list(space)
        self._index = {cell: i for i, cell in enumerate(self._cells)}
        self._lines = [np.array([self._index[c] for c in budget.cells]) for budget in budgets]
        self._design = DESIGNS[design](space, budgets)
        if design == "lines" and dense is not None:
            self._design = self._design[:1]
        self._costs = np.array([cost(cell) for cell in self._cells])
        self._feasible = np.unique(np.concatenate(self._lines))
        self._degree, self._hints, self._dense = degree, hints, dense
        self._blend = Blend(ratios(space), degree, dense=dense)
        self._known: list[Hint] = []

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Both counts are proposed together."""
        return {
            "n_attn": IntDistribution(0, self._space.n_attn),
            "n_act": IntDistribution(0, self._space.n_act),
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose the next cell.

        Raises:
            ValueError: the study has several objectives.
        """
        self._raise_error_if_multi_objective(study)
        if any(name not in search_space for name in PARAMETERS):
            # Somebody fixes a count (PartialFixedSampler): the other one is left to chance.
            return {}
        sign = 1.0 if study.direction is StudyDirection.MAXIMIZE else -1.0
        done: list[tuple[int, float]] = []
        running: list[int] = []
        failed: list[int] = []
        undecided = 0
        for other in study.get_trials(deepcopy=False):
            if other.number == trial.number:
                continue
            index = self._cell_index(other)
            if index is None:
                undecided += other.state is TrialState.RUNNING and other.number < trial.number
            elif other.state is TrialState.COMPLETE and other.value is not None and math.isfinite(other.value):
                done.append((index, sign * other.value))
            elif other.state is TrialState.RUNNING:
                # A later one that has its cell already was given it with this one's in mind.
                running += [index] if other.number < trial.number else []
            elif other.state.is_finished():
                failed.append(index)
        # A proposal follows from the trials alone, so what other workers are about to propose is known here too.
        for _ in range(undecided):
            running.append(self.next_cell(done, running, failed))
        cell = self._cells[self.next_cell(done, running, failed)]
        return {"n_attn": cell.n_attn, "n_act": cell.n_act}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Leave parameters that are not cells to a random draw that depends on the trial's number and their name alone.

        Raises:
            ValueError: the study has several objectives.
        """
        self._raise_error_if_multi_objective(study)
        sampler = optuna.samplers.RandomSampler(seed=zlib.crc32(f"{trial.number} {param_name}".encode()))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def next_cell(self, done: Sequence[tuple[int, float]], running: Sequence[int], failed: Sequence[int] = ()) -> int:
        """Return the index of the cell to try next.

        Args:
            done: cell index and accuracy of every finished trial, in any order.
            running: cell index of every trial that still runs.
            failed: cell index of every trial that ended without an accuracy; such a cell is not tried again unless a
                trial of it finished.
        """
        succeeded = {cell for cell, _ in done}
        touched = succeeded | set(running) | set(failed)
        self._take_hints()
        for cell in self._design:
            if self._index[cell] not in touched:
                return self._index[cell]
        if not done and self._dense is None:
            # Nothing to learn from yet, more workers than design: what is nearest to it and not under way.
            return next((i for i in np.concatenate(self._lines).tolist() if i not in touched), int(self._lines[-1][0]))
        cells, accuracies = np.array([cell for cell, _ in done], dtype=np.int64), np.array([value for _, value in done])
        pending = np.array(running, dtype=np.int64)
        asked = np.union1d(self._feasible, pending)
        where = np.searchsorted(asked, pending)
        models = self._blend.by_model(Data.of(cells, accuracies), asked)
        worth = np.full(len(self._cells), -np.inf)
        worth[asked] = self._worth([(weight, beliefs.with_pending(where)) for weight, beliefs in models], asked)
        worth[[cell for cell in failed if cell not in succeeded]] = -np.inf
        others = worth.copy()
        others[pending] = -np.inf
        if worth.max() == -np.inf:
            # Every feasible cell failed: one of them again, as without a belief.
            return int(self._lines[-1][0])
        # A cell under way is begun again only where nothing else is worth a trial.
        return int(np.argmax(others if others.max() > 0 else worth))

    def _take_hints(self) -> None:
        hints = list(self._hints())
        same = len(hints) == len(self._known) and all(
            np.array_equal(hint.mean, known.mean) for hint, known in zip(hints, self._known, strict=True)
        )
        if not same:
            self._blend, self._known = Blend(ratios(self._space), self._degree, hints, self._dense), hints

    def _worth(self, models: Sequence[tuple[float, Posterior]], asked: np.ndarray) -> Array:
        """Return the value of one trial of every cell asked about per unit of cost, averaged over the models.

        Args:
            models: each one's weight and its beliefs about the cells asked about.
            asked: [k] indices of these cells.
        """
        lines = [np.searchsorted(asked, line) for line in self._lines]
        # Not of the averaged beliefs: where models differ widely, as about cliffs, their difference would pass for
        # something that a trial may turn out to be, and trials of hopeless cells for the most valuable ones.
        worth = _gain(models, lines) / self._costs[asked]
        if worth.max() * self._costs.max() > _INDIFFERENT:
            return worth
        # Nothing is expected to change a decision: look where the feasible cells are least known.
        variance = sum(weight * beliefs.sd**2 for weight, beliefs in models)
        unsure = np.zeros(len(asked))
        for line in lines:
            unsure[line] = np.sqrt(variance)[line]
        return unsure

    def _cell_index(self, trial: FrozenTrial) -> int | None:
        """Return a trial's cell; None when it has none, or one of another space."""
        if any(name not in trial.params for name in PARAMETERS):
            return None
        counts = [int(trial.params[name]) for name in PARAMETERS]
        return self._index.get(Cell(*counts)) if min(counts) >= 0 else None


def _gain(models: Sequence[tuple[float, Posterior]], lines: Sequence[np.ndarray]) -> Array:
    """Return the knowledge gradient of one trial of every cell, summed over lines, averaged over models, [cells]."""
    weights = np.array([weight for weight, _ in models])
    means = np.stack([beliefs.mean for _, beliefs in models])
    slopes = np.stack([_slopes(beliefs) for _, beliefs in models])
    found = np.zeros(slopes.shape[:2])
    for line in lines:
        each = np.repeat(means[:, line], slopes.shape[1], axis=0)
        found += knowledge_gradient(each, slopes[:, :, line].reshape(each.shape)).reshape(found.shape)
    return np.asarray(weights @ found)


def _slopes(beliefs: Posterior) -> Array:
    """Return the change of every posterior mean per standard deviation of each cell's next trial, [cells, cells]."""
    return np.asarray(beliefs.covariance / np.sqrt(np.diag(beliefs.covariance) + beliefs.noise**2)[:, None])


def initial_design(space: RatioSpace, budgets: Sequence[Goal]) -> list[Cell]:
    """Return what to try before there is anything to learn from.

    Of the middle budget's line the middle and, a sixth of its length inside, both ends: the ends themselves lie beyond
    cliffs more often than not. For several budgets the dense model too, which tells how far the plateau goes.
    """
    ordered = sorted(budgets, key=lambda budget: budget.depth)
    line = ordered[len(ordered) // 2].cells
    inside = round(len(line) / 6)
    cells = [line[len(line) // 2], line[-1 - inside], line[inside], *([Cell(0, 0)] if len(budgets) > 1 else [])]
    return list(dict.fromkeys(cells))


def single_kind_walks(space: RatioSpace) -> list[Cell]:
    """Return the dense model and two thirds along each kind, one unit at a time."""
    attn, act = (max(1, round(2 * n / 3)) for n in (space.n_attn, space.n_act))
    walks = [*(Cell(a, 0) for a in range(1, attn + 1)), *(Cell(0, g) for g in range(1, act + 1))]
    return [Cell(0, 0), *(cell for cell in walks if cell in space)]


def interleaved_walk(space: RatioSpace) -> list[Cell]:
    """Return the staircase along the diagonal, alternately one activation and one attention more, from (1,1) on."""
    steps = round((space.n_attn + space.n_act) * 5 / 24)
    stairs = (Cell((k + 1) // 2, k // 2 + 1) for k in range(1, steps + 1))
    return [cell for cell in stairs if cell in space]


def published_walks(space: RatioSpace) -> list[Cell]:
    """Return the cells of the published samples, scaled to the space: on 12 + 12 units they are the 22 of HetDPT."""
    return [*single_kind_walks(space), *interleaved_walk(space)]


DESIGNS: dict[str, Callable[[RatioSpace, Sequence[Goal]], list[Cell]]] = {
    "lines": initial_design,
    "walk": lambda space, budgets: published_walks(space),
    "interleaved": lambda space, budgets: [Cell(0, 0), *interleaved_walk(space)],
}
"""What is tried before there is anything to learn from, by name."""


def ratios(space: RatioSpace) -> Array:
    """Return the pruning ratios of every cell, [cells, 2], in the space's order."""
    return np.array([space.ratios(cell) for cell in space])
