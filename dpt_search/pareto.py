"""The accuracy that every amount of speed costs: the answers to all budgets of one quantity at once."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpt_search.summary import text_table
from search_spaces.budgets import Budget
from search_spaces.costs import Cost, UnitCosts
from search_spaces.goals import CellCosts, front
from search_spaces.plan import PruningPlan
from search_spaces.ratios import Cell

_Z95 = 1.96


@dataclass(frozen=True)
class Answer:
    """One cell of the front.

    Attributes:
        cell: how many units of each kind go.
        plan: text form of what goes.
        gain: how many times less of the quantity it takes than the dense model: the speedup, for seconds.
        mean: posterior mean of a trial's accuracy on val.
        sd: its posterior standard deviation.
        trials: finished trials of the cell.
        cost: predicted.
    """

    cell: Cell
    plan: str
    gain: float
    mean: float
    sd: float
    trials: int
    cost: Cost

    @property
    def low(self) -> float:
        """Lower end of the 95 % credible interval."""
        return max(0.0, self.mean - _Z95 * self.sd)

    @property
    def high(self) -> float:
        """Upper end of the 95 % credible interval."""
        return min(1.0, self.mean + _Z95 * self.sd)

    @property
    def status(self) -> str:
        """`predicted`, `observed` or `confirmed`, as of a recommendation."""
        return ("predicted", "observed", "confirmed")[min(2, self.trials)]


def gain_of(costs: CellCosts, about: Budget, plan: PruningPlan) -> float:
    """Return how many times less a plan takes of what a budget is about; as measured where it was built and timed.

    It is nan where its units seem to save everything.
    """
    measured = costs.measured.get(str(plan), {}).get(about.batch)
    if measured is not None and about.quantity == "speedup":
        return measured.speedup
    dense, cost = costs.costs.dense, costs.costs.of(plan)
    return math.nan if math.isnan(about.reached(cost, dense)) else about.of(dense) / about.of(cost)


def pareto(
    surface: Mapping[str, Any], costs: CellCosts, about: Budget, most: Cell, trials: Mapping[Cell, int]
) -> list[Answer]:
    """Return the cells that answer some budget of a quantity and that no other answer beats in both, dense end first.

    Every gain that a cell has is taken as a limit and decided as a recommendation is, on the front of the cells that
    meet it.

    Args:
        surface: `mean` and `sd`, rows of n_attn and columns of n_act.
        costs: of the cells.
        about: names the quantity and the batch size; its value does not matter.
        most: the most units of each kind that may go.
        trials: number of finished trials by cell.
    """
    mean, sd = surface["mean"], surface["sd"]
    cells = [cell for cell in costs.ranking.space if cell.n_attn <= most.n_attn and cell.n_act <= most.n_act]
    gains = {cell: gain_of(costs, about, costs.ranking.plan(cell)) for cell in cells}
    chosen = set()
    for limit in {gain for gain in gains.values() if gain >= 1}:
        meets = front(cell for cell in cells if gains[cell] >= limit)
        chosen.add(max(meets, key=lambda cell: mean[cell.n_attn][cell.n_act]))
    answers: list[Answer] = []
    for cell in sorted(chosen, key=lambda cell: (-gains[cell], -mean[cell.n_attn][cell.n_act])):
        value, plan = mean[cell.n_attn][cell.n_act], costs.ranking.plan(cell)
        if not answers or value > answers[-1].mean:
            deviation, cost = sd[cell.n_attn][cell.n_act], costs.costs.of(plan)
            answers.append(Answer(cell, str(plan), gains[cell], value, deviation, trials.get(cell, 0), cost))
    return answers[::-1]


def label_of(about: Budget, costs: UnitCosts) -> str:
    """Return what a gain is, for a column or an axis."""
    if about.quantity == "speedup":
        return f"speedup at batch {about.batch}{', compiled' if costs.compiled else ''}"
    return f"times fewer {'MACs' if about.quantity == 'macs' else 'parameters'}"


def pareto_table(answers: Sequence[Answer], about: Budget, costs: UnitCosts, accuracy: float | None) -> str:
    """Return one line per answer; accuracies are on val, after a trial's short fine-tune.

    Args:
        answers: the front.
        about: its quantity.
        costs: of the dense model and its units.
        accuracy: of the dense model on val; None where it is not known.
    """
    dense = costs.dense
    header = (label_of(about, costs), "cell", "val accuracy", "points to dense", "MACs", "parameters", "status", "plan")
    rows = [
        (
            f"{each.gain:.2f}x", str(each.cell), f"{each.mean:.1%} ± {_Z95 * each.sd:.1%}",
            "" if accuracy is None else f"{100 * (each.mean - accuracy):+.1f}",
            f"{each.cost.macs / dense.macs:.0%}", f"{each.cost.params / dense.params:.0%}", each.status, each.plan,
        )
        for each in answers
    ]  # fmt: skip
    return text_table(header, rows)


def pareto_csv(answers: Sequence[Answer], costs: UnitCosts) -> str:
    """Return the front as CSV: accuracies as fractions, predicted speedups by batch size, shares of the dense model."""
    stream = io.StringIO()
    written = csv.writer(stream, lineterminator="\n")
    dense = costs.dense
    speedups = [f"speedup_{batch}" for batch in dense.seconds]
    names = ("gain", "n_attn", "n_act", "plan", "accuracy", "sd", "low", "high", "trials", "status")
    written.writerow([*names, *speedups, "macs_share", "params_share"])
    for each in answers:
        told = (each.gain, each.cell.n_attn, each.cell.n_act, each.plan, each.mean, each.sd, each.low, each.high)
        faster = [costs.speedup(PruningPlan.parse(each.plan), batch) for batch in dense.seconds]
        shares = (each.cost.macs / dense.macs, each.cost.params / dense.params)
        written.writerow([*told, each.trials, each.status, *faster, *shares])
    return stream.getvalue()
