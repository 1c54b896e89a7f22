"""Budgets against what cells cost: which cells meet one, and among which of them it has to be decided."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from search_spaces.budgets import Budget
from search_spaces.costs import Cost, UnitCosts
from search_spaces.plan import PruningPlan, Ranking
from search_spaces.ratios import Cell, RatioSpace


@dataclass(frozen=True)
class Goal:
    """A budget as a search sees it: the cells among which it has to be decided, by growing `n_attn`.

    They are the budget's front. A cell beyond it removes all that some cell of the front removes, and more, for a
    budget that the latter meets already: it can be no more accurate but by noise, so neither trials nor the decision
    look there.
    """

    name: str
    cells: tuple[Cell, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def depth(self) -> float:
        """Mean number of units that its cells remove."""
        return sum(cell.total for cell in self.cells) / len(self.cells)


@dataclass(frozen=True)
class Measured:
    """Speedup of a plan that was built and timed: the median over rounds and the low end of its 95 % interval."""

    speedup: float
    low: float


@dataclass(frozen=True)
class Standing:
    """How a cell stands to a budget, in the unit of the budget's value.

    Attributes:
        predicted: what its plan reaches, from what its units save one by one; nan where they seem to save everything.
        measured: what its plan reached when it was built and timed; None where it was not.
        meets: whether it meets the budget: by the low end of what was measured, so that it will again when it is
            exported, or else as predicted.
        is_sure: False for a cell that was not measured and whose predicted cost is within its spread of the limit.
    """

    predicted: float
    measured: float | None
    meets: bool
    is_sure: bool


@dataclass(frozen=True)
class CellCosts:
    """What the plan of every cell costs.

    Attributes:
        ranking: gives the plans.
        costs: of units.
        measured: speedups of plans that were built and timed, by text form and batch size.
    """

    ranking: Ranking
    costs: UnitCosts
    measured: Mapping[str, Mapping[int, Measured]] = field(default_factory=dict)

    @cached_property
    def _predicted(self) -> dict[Cell, tuple[PruningPlan, Cost]]:
        """Every cell's plan and what it is predicted to cost; several budgets ask for all of them."""
        plans = {cell: self.ranking.plan(cell) for cell in self.ranking.space}
        return {cell: (plan, self.costs.of(plan)) for cell, plan in plans.items()}

    def standing(self, budget: Budget, cell: Cell) -> Standing:
        """Return how a cell stands to a budget that is not one of units.

        Raises:
            ValueError: the budget's batch size was not timed.
        """
        dense = self.costs.dense
        if budget.batch and budget.batch not in dense.seconds:
            known = ", ".join(map(str, sorted(dense.seconds)))
            raise ValueError(f"budget {budget}: speed is known at batch {known} only; profile with --timing-batches")
        plan, cost = self._predicted[cell]
        predicted = budget.reached(cost, dense)
        measured = self.measured.get(str(plan), {}).get(budget.batch) if budget.batch else None
        if measured is not None:
            return Standing(predicted, measured.speedup, budget.is_met_by(measured.low), True)
        # Counts are exact, but for sums of floats.
        away, exact = budget.limit(dense) - budget.of(cost), 1e-9 * budget.of(dense)
        spread = self.costs.spread(plan, budget.batch) if budget.batch else 0.0
        meets = away >= -exact and not math.isnan(predicted)
        return Standing(predicted, None, meets, not spread or abs(away) > spread)

    def surely(self, budget: Budget, cell: Cell) -> float:
        """Return what a cell reaches at the worst: with its spread on top of its cost, or the low end as measured.

        It is nan where its units seem to save everything.
        """
        plan, cost = self._predicted[cell]
        measured = self.measured.get(str(plan), {}).get(budget.batch) if budget.batch else None
        if measured is not None:
            return measured.low
        if budget.batch:
            slower = cost.seconds[budget.batch] + self.costs.spread(plan, budget.batch)
            cost = replace(cost, seconds={budget.batch: slower})
        return budget.reached(cost, self.costs.dense)


def front(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """Return the cells that have no neighbour one unit smaller among them, by growing `n_attn`."""
    there = {(cell.n_attn, cell.n_act) for cell in cells}
    least = ((a, g) for a, g in sorted(there) if (a - 1, g) not in there and (a, g - 1) not in there)
    return tuple(Cell(a, g) for a, g in least)


def feasible(budget: Budget, space: RatioSpace, costs: CellCosts | None = None, most: Cell | None = None) -> list[Cell]:
    """Return all cells that meet a budget, sorted.

    Args:
        budget: what they have to meet.
        space: the lattice.
        costs: of the cells; needed by all budgets but those of units.
        most: the most units of each kind that may go; None for all.

    Raises:
        ValueError: there are none, or the budget cannot be answered with what is known.
    """
    allowed = [cell for cell in space if most is None or (cell.n_attn <= most.n_attn and cell.n_act <= most.n_act)]
    if budget.quantity == "units":
        found = [cell for cell in allowed if cell.total == budget.value]
    elif costs is None:
        raise ValueError(f"budget {budget} needs the costs of units, which are not known here: use units=K")
    else:
        found = [cell for cell in allowed if costs.standing(budget, cell).meets]
    if not found:
        raise ValueError(_out_of_reach(budget, allowed, costs))
    return found


def _out_of_reach(budget: Budget, allowed: Sequence[Cell], costs: CellCosts | None) -> str:
    last = allowed[-1]
    units = f"{last.total} removable units ({last.n_attn} attn, {last.n_act} act)"
    if budget.quantity == "units" or costs is None:
        return f"budget {budget} is larger than the space: the model has {units}; ask for at most units={last.total}"
    reached = [value for cell in allowed if not math.isnan(value := costs.surely(budget, cell))]
    # Rounded towards what can be had.
    if budget.quantity == "speedup":
        best, word = f"{int(max(reached) * 100) / 100:g}", "at most"
    elif budget.value <= 1:
        best, word = f"{min(1.0, int(min(reached) * 1000 + 1) / 1000):g}", "at least"
    else:
        best, word = f"{int(min(reached) / 1e3 + 1):d}K", "at least"
    return f"no plan meets budget {budget}: the model has {units}; ask for {word} {budget.about}={best}"


def goals(
    budgets: Iterable[Budget], space: RatioSpace, costs: CellCosts | None = None, most: Cell | None = None
) -> tuple[Goal, ...]:
    """Return every budget with the cells among which it has to be decided; arguments and errors as `feasible`."""
    return tuple(Goal(str(budget), front(feasible(budget, space, costs, most))) for budget in budgets)


def unit_goals(space: RatioSpace, *units: int) -> tuple[Goal, ...]:
    """Return the goals of budgets of units: the lines of so many units removed."""
    return goals(map(Budget, units), space)
