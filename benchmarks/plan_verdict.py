"""What the trials of a cell's plans say: the verdicts of `plan_regret.py`, with their standard errors.

Accuracies are fractions; a table of them has shape (plans, seeds), with the ranking's own plan in row 0.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpt_search.summary import text_table

Array = NDArray[np.float64]
Records = dict[str, list[list[dict[str, Any]]]]
"""The records of one cell's trials by kind, plan and seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean of accuracies, or a difference of such means, and its standard error."""

    value: float
    error: float


def accuracies(records: Sequence[dict[str, Any]]) -> list[float]:
    """Return the last accuracy of every trial of a plan; nan where it failed."""
    return [float("nan") if record["error"] else record["accuracies"][-1] for record in records]


def noise_of(rows: Sequence[Sequence[float]]) -> float:
    """Return the standard deviation of one trial about its plan's mean, pooled over plans."""
    values = np.array(rows)
    values = values[np.isfinite(values).all(axis=1)]
    return float(np.sqrt(values.var(axis=1, ddof=1).mean())) if len(values) else float("nan")


def judged(kinds: Records, noise: float) -> dict[str, Any]:
    """Return what one cell says, given the standard deviation of a trial; a plan with a failed trial is left out."""
    rows = {str(each[0]["plan"]): accuracies(each) for of in kinds.values() for each in of}
    failed = [plan for plan, values in rows.items() if not np.isfinite(values).all()]
    names = [plan for plan in rows if plan not in failed]
    own = kinds["ranking"][0][0]["plan"]
    if own in failed:
        return {"failed": failed, "plans": rows_of(kinds)}
    table = np.array([rows[plan] for plan in names])
    means = table.mean(axis=1)
    by_kind = {
        kind: [names.index(each[0]["plan"]) for each in of if each[0]["plan"] in names] for kind, of in kinds.items()
    }
    return {
        "regret": asdict(plan_regret(table, noise)),
        "rank": 1 + int((means > means[0]).sum()),
        "of": len(names),
        "kinds": {kind: of_kind(table, indices, noise) for kind, indices in by_kind.items() if indices},
        "failed": failed,
        "plans": rows_of(kinds),
    }


def rows_of(kinds: Records) -> list[dict[str, Any]]:
    """Return kind, plan and accuracies of every plan as plain data; null where a trial failed."""
    return [
        {"kind": kind, "plan": each[0]["plan"], "accuracies": [a if np.isfinite(a) else None for a in accuracies(each)]}
        for kind, of in kinds.items()
        for each in of
    ]


def plan_regret(table: Array, noise: float) -> Estimate:
    """Return what the plan in row 0 loses against the best: chosen by all seeds but one, both judged on that one."""
    weights, seeds = np.zeros_like(table), table.shape[1]
    for judge in range(seeds):
        best = int(np.delete(table, judge, axis=1).mean(axis=1).argmax())
        weights[best, judge] += 1 / seeds
        weights[0, judge] -= 1 / seeds
    return weighed(weights, table, noise)


def of_kind(table: Array, indices: Sequence[int], noise: float) -> dict[str, Any]:
    """Return a kind's mean, its best plan's mean (flattered by the choice), and its mean less that of row 0."""
    weights = np.zeros_like(table)
    for index in indices:
        weights[index] += 1 / len(indices) / table.shape[1]
    mean, best = weighed(weights, table, noise), float(table[list(indices)].mean(axis=1).max())
    weights[0] -= 1 / table.shape[1]
    less = weighed(weights, table, noise)
    return {"plans": len(set(indices)), "mean": asdict(mean), "best": best, "over_ranking": asdict(less)}


def weighed(weights: Array, table: Array, noise: float) -> Estimate:
    return Estimate(float((weights * table).sum()), noise * float(np.sqrt((weights**2).sum())))


def said(name: str, cell: dict[str, Any]) -> str:
    """Return a cell's table as text; accuracies in per cent, differences in points."""
    left_out = f"; left out, because a trial failed: {'; '.join(cell['failed'])}" if cell["failed"] else ""
    if "regret" not in cell:
        return f"{name}: no answer{left_out}"
    rows = [
        (kind, str(each["plans"]), f"{each['mean']['value']:.2%}", f"{each['best']:.2%}", points(each["over_ranking"]))
        for kind, each in cell["kinds"].items()
    ]
    title = (
        f"{name}: plan regret {points(cell['regret'])} points; the ranking's plan is number {cell['rank']} of "
        f"{cell['of']}{left_out}"
    )
    return f"{title}\n{text_table(('plans', 'number', 'mean', 'best', 'over the ranking'), rows)}"


def points(estimate: dict[str, float]) -> str:
    return f"{100 * estimate['value']:+.2f} ± {100 * estimate['error']:.2f}"
