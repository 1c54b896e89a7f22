"""Whether an exported model reaches the budget that it was made for, as measured."""

from __future__ import annotations

from typing import Any

from search_spaces.budgets import Budget, parse_budgets
from search_spaces.plan import PruningPlan


def verdict(budget: str, summary: dict[str, Any]) -> dict[str, Any]:
    """Compare an export's summary with its budget.

    Args:
        budget: its text form.
        summary: with plan, params, MACs and timing of dense and merged.

    Returns:
        `met`, None where its batch size was not timed; `reached`, in the unit of the budget; and `text` for the user.
    """
    (wanted,) = parse_budgets(budget)
    reached, how = _reached(wanted, summary)
    if reached is None:
        return {"met": None, "reached": None, "text": f"budget {budget}: not measured at batch {wanted.batch}"}
    met = reached == wanted.value if wanted.quantity == "units" else wanted.is_met_by(reached)
    return {"met": met, "reached": reached, "text": f"budget {budget}: {'met' if met else 'NOT met'}, {how}"}


def _reached(wanted: Budget, summary: dict[str, Any]) -> tuple[float | None, str]:
    if wanted.quantity == "units":
        removed = len(PruningPlan.parse(summary["plan"]))
        return removed, f"{removed} units removed"
    if wanted.quantity == "speedup":
        found = summary["timing"].get(str(wanted.batch))
        if found is None:
            return None, ""
        ends = f"95 % interval {found['low']:.2f}x to {found['high']:.2f}x"
        return found["speedup"], f"{found['speedup']:.3f}x measured at batch {wanted.batch} ({ends})"
    dense, merged = (float(summary[name][wanted.quantity]) for name in ("dense", "merged"))
    share = f"{merged:,.0f} {wanted.quantity} left, {merged / dense:.3f} of the dense model's"
    return (merged / dense if wanted.value <= 1 else merged), share
