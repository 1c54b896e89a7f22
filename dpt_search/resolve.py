"""`dpt-search resolve`: budgets answered from the trials already paid for, with no training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

from dpt_search.config import BadConfig
from dpt_search.decisions import cell_costs, most_of
from dpt_search.run import Run
from dpt_search.store import BadRun
from dpt_search.summary import recommendation_table
from search_spaces.budgets import Budget, parse_budgets

CSV, PLOT = "pareto.csv", "plots/pareto.png"


def answer(run: Run, budgets: tuple[Budget, ...]) -> Iterator[str]:
    """Decide budgets, and yield what to print; nothing is written."""
    # After the checks, which are quick: it imports scipy and optuna.
    from dpt_search.search_stages import decide

    yield recommendation_table(decide(run, budgets)["budgets"])
    costs = cell_costs(run.store)
    if costs is not None and costs.costs.compiled:
        yield "speeds are those of compiled models"


def answer_all(run: Run, against: str) -> Iterator[str]:
    """Answer all budgets of one quantity at once, write CSV and plot into the run directory, and yield what to print.

    Raises:
        BadConfig: the quantity is none that has a price, or is not known of this run.
        BadRun: there is no profile, or no trial has finished yet.
    """
    about, costs = _quantity(against), cell_costs(run.store)
    if costs is None:
        raise BadRun(f"no costs in {run.store.location!r}: run `dpt-search profile` and `rank` on it first")
    if about.batch and about.batch not in costs.costs.dense.seconds:
        known = ", ".join(map(str, sorted(costs.costs.dense.seconds)))
        raise BadConfig(f"--against {against}: speed is known at batch {known} only; profile with --timing-batches")
    from dpt_search.pareto import gain_of, label_of, pareto, pareto_csv, pareto_table
    from dpt_search.plots import png
    from dpt_search.search_stages import decide, observations_of
    from dpt_search.tradeoff_plot import Tradeoff, tradeoff
    from search_spaces.plan import PruningPlan

    found, seen = decide(run, run.config.budgets), observations_of(run)
    most = most_of(costs.ranking.space, run.config.max_attn, run.config.max_act)
    front = pareto(found["surface"], costs, about, most, Counter(each.plan.cell for each in seen))
    checked = run.store.read_json("dense/dense.json")
    told = Tradeoff(
        label_of(about, costs.costs),
        [(gain_of(costs, about, PruningPlan.parse(row["plan"])), row) for row in found["budgets"]],
        str(run.config.chosen_budget),
        front,
        [(gain_of(costs, about, each.plan), each.accuracy) for each in seen],
        checked,
    )
    run.store.write(CSV, pareto_csv(front, costs.costs).encode())
    run.store.write(PLOT, png(partial(tradeoff, told=told), (9.0, 4.8), "light"))
    yield pareto_table(front, about, costs.costs, checked["accuracy"] if checked else None)
    yield f"\ntable: {run.store.path(CSV)}\nplot: {run.store.path(PLOT)}"


def _quantity(text: str) -> Budget:
    try:
        (about,) = parse_budgets(f"{text}=1")
    except ValueError:
        about = Budget(0)
    if about.quantity == "units":
        raise BadConfig(f"cannot set accuracy against {text!r}: use speedup, speedup@1, macs or params")
    return about
