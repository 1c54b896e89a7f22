"""What a run has to decide: its budgets against what cells cost, and the plans that were built and timed for it.

A prediction near a budget's limit is not to be relied on. A cell of a front whose predicted seconds are within their
spread of the limit is therefore built and timed before anything is trained for it, and counts as measured from then on.
So is the plan that is to be fine-tuned for a speedup, wherever it is predicted to be: its training takes long.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from dpt_search.config import BadConfig, RunConfig
from dpt_search.costs_table import read_costs
from dpt_search.run import Run, read_ranking
from dpt_search.store import RunStore
from search_spaces.budgets import Budget
from search_spaces.goals import CellCosts, Goal, Measured, goals
from search_spaces.plan import PruningPlan, Ranking
from search_spaces.ratios import Cell, RatioSpace
from trainables.tasks import TimingTask

NAME = "measured.json"


def goals_of(run: Run, budgets: Sequence[Budget] = ()) -> tuple[Goal, ...]:
    """Return the cells among which each budget has to be decided; the configured budgets where none are given.

    Raises:
        BadRun: there is no ranking yet.
        BadConfig: a budget is out of reach, or needs costs that are not known; the message says what can be reached.
    """
    space = read_ranking(run).space
    try:
        return goals(budgets or run.config.budgets, space, cell_costs(run.store), _most(run.config, space))
    except ValueError as error:
        raise BadConfig(str(error)) from None


def check_units(config: RunConfig, space: RatioSpace) -> None:
    """Refuse budgets of units that the space cannot meet: all that can be said before anything was measured.

    Raises:
        BadConfig: one is larger than the space.
    """
    try:
        goals((each for each in config.budgets if each.quantity == "units"), space, most=_most(config, space))
    except ValueError as error:
        raise BadConfig(str(error)) from None


def most_of(space: RatioSpace, max_attn: int | None, max_act: int | None) -> Cell:
    """Return the most units of each kind that may go, where some of a kind's have to stay."""
    attn, act = (space.n_attn if max_attn is None else max_attn), (space.n_act if max_act is None else max_act)
    return Cell(min(space.n_attn, attn), min(space.n_act, act))


def _most(config: RunConfig, space: RatioSpace) -> Cell:
    return most_of(space, config.max_attn, config.max_act)


def cell_costs(store: RunStore) -> CellCosts | None:
    """Return what cells cost, as far as a run knows; None before profile and ranking."""
    costs, order, found = read_costs(store), store.read_json("ranking.json"), store.read_json(NAME) or {}
    if costs is None or order is None:
        return None
    measured = {
        plan: {int(batch): Measured(t["speedup"], t["low"]) for batch, t in timing.items()}
        for plan, timing in found.items()
    }
    return CellCosts(Ranking(tuple(order["attn"]), tuple(order["act"])), costs, measured)


def standing_of(run: Run, budget: Budget, cell: Cell) -> dict[str, Any] | None:
    """Return how a cell stands to a budget, as plain data; None for a budget of units, which every cell meets."""
    costs = cell_costs(run.store)
    if budget.quantity == "units" or costs is None:
        return None
    stands = costs.standing(budget, cell)
    predicted = None if math.isnan(stands.predicted) else stands.predicted
    return {"predicted": predicted, "measured": stands.measured, "is_sure": stands.is_sure}


def settled(run: Run) -> tuple[Goal, ...]:
    """Return `goals_of` the configured budgets, with no cell too close to its limit to rely on the prediction.

    Raises:
        BadRun, BadConfig: as `goals_of`, which should have been asked first: this one needs Ray.
    """
    while True:
        found, costs = goals_of(run), cell_costs(run.store)
        pairs = [(b, cell) for b, goal in zip(run.config.budgets, found, strict=True) for cell in goal.cells]
        limited = [(b, cell) for b, cell in pairs if b.quantity != "units"]
        if costs is None or all(costs.standing(b, cell).is_sure for b, cell in limited):
            return found
        # One that fails makes room on the front for the next.
        unsure = {costs.ranking.plan(cell) for b, cell in limited if not costs.standing(b, cell).is_sure}
        what = "1 plan that is" if len(unsure) == 1 else f"{len(unsure)} plans that are"
        measure(run, unsure, f"{what} too close to the limit of a budget to rely on the prediction")


def measure(run: Run, plans: Collection[PruningPlan], what: str) -> None:
    """Build plans and time them beside the dense model, on a worker, and record what came out.

    Args:
        run: a run with its profile.
        plans: to time.
        what: they are, for the user.
    """
    config = run.config
    told = sorted(map(str, plans))
    run.say(f"measuring {what}")
    costs = read_costs(run.store)
    # Compared with the profile's predictions, so measured as it was.
    compiled = costs is not None and costs.compiled
    task = TimingTask(
        **run.task(), batches=tuple(config.batches), seconds=config.timing_seconds, compiled=compiled, plans=tuple(told)
    )
    found = run.call("trainables.timing:time_plans", task)
    run.store.write_json(NAME, {**(run.store.read_json(NAME) or {}), **found})
