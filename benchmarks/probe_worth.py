"""What does the elastic probe cost, how well does it order the cells, and what is it worth to a search?

    python benchmarks/probe_worth.py TABLE PROBES [PROBES ...] [--seeds 18] [--max-trials 18]

TABLE is a surface that `dpt-search tabulate` wrote, each PROBES what `tabulate --probes N` wrote of the same model,
with other epochs, say. Costs are in trials of the dense model. Kendall's tau is to the mean of the table's trials,
over all cells that both have and within the budget lines, averaged over lines and probe seeds. The coefficients are
what of the probe's losses is left in the trials, by least squares over the feasible cells: of its losses by
attentions, by activations, and by both at once beyond their sum. Replays of `map/probe` decide all of the default
budgets at once, as `dpt-search compare` does. Where a probe tells losses, it is believed by them, and once more by its
accuracies alone. How much of the evaluation shared prefixes of the network would save, were every prefix of the
evaluated plans computed once, follows from the plans: with a block's attention counted as one, its two linear layers
as two, and as half once they are merged.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
from scipy.stats import kendalltau

from dpt_search.compare import POINT, Judge
from dpt_search.compare_report import TARGETS, budgets_of
from dpt_search.curves import Curve, mean_curve
from dpt_search.hints import by_loss
from dpt_search.probe_seeds import ProbeSeeds, read_probes
from dpt_search.replays import compare
from dpt_search.surface_table import SurfaceTable, read_rows, read_table
from search_spaces.goals import Goal
from search_spaces.plan import PruningPlan, Unit
from search_spaces.ratios import Cell

OUT = Path(__file__).parent / "results" / "probe_worth"
STRATEGY = "map/probe"
REGRETS = (5.0, 6.0, 8.0, 10.0)
"""Costs at which regret is told."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table")
    parser.add_argument("probes", nargs="+")
    parser.add_argument("--seeds", type=int, default=18)
    parser.add_argument("--max-trials", type=int, default=18)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = read_table(args.table)
    found = {}
    for place in args.probes:
        probes, name = read_probes(place), Path(place).name
        assert probes is not None, f"{place} does not exist"
        told = args.seeds, args.max_trials
        found[name] = worth(table, args.table, name, probes, *told)
        if probes.losses is not None:
            name += " by its accuracies"
            found[name] = worth(table, args.table, name, replace(probes, losses=None), *told)
    OUT.mkdir(parents=True, exist_ok=True)
    made = {"seeds": args.seeds, "max_trials": args.max_trials, "probes": found}
    (OUT / f"{Path(args.table).stem}.json").write_text(json.dumps(made, indent=1) + "\n")


def worth(table: SurfaceTable, location: str, place: str, probes: ProbeSeeds, seeds: int, max_trials: int) -> dict:
    budgets = budgets_of("", table.space)
    known = Judge(table, budgets, 0, probes).probe
    assert known is not None
    cells, values = known.evaluated(table.space, budgets), said(probes)
    found = {
        "epochs": probes.epochs, "training": known.training, "evaluation": sum(known.costs[cell] for cell in cells),
        "cells": len(cells), **taus(table, probes.cells, values, budgets),
        "left": left(table, probes.cells, values, budgets), "shared_prefixes_save": saved(location, cells),
    }  # fmt: skip
    told = {"seeds": seeds, "workers": 1, "max_trials": max_trials, "processes": os.cpu_count() or 1}
    traces = compare(table, [STRATEGY], budgets, probes=probes, **told)[STRATEGY]
    found |= decided(mean_curve(STRATEGY, traces, np.arange(0.5, max_trials, 0.5)))
    print(f"{place}: " + ", ".join(f"{name} {_shown(value)}" for name, value in found.items()), flush=True)
    return found


def said(probes: ProbeSeeds) -> np.ndarray:
    """Return what the probes say of each cell, in units of accuracy, [cells, seeds]."""
    if probes.losses is None:
        return probes.accuracies
    return np.stack([by_loss(*each) for each in zip(probes.accuracies.T, probes.losses.T, strict=True)], axis=1)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_shown(each) for each in value) + "]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def taus(table: SurfaceTable, cells: Sequence[Cell], values: np.ndarray, budgets: Sequence[Goal]) -> dict[str, float]:
    truth = dict(zip(table.cells, np.nanmean(table.accuracies, axis=1), strict=True))
    both = [i for i, cell in enumerate(cells) if cell in truth]
    lines = [[i for i in both if cells[i] in budget.cells] for budget in budgets]

    def tau(some: list[int]) -> list[float]:
        means = [truth[cells[i]] for i in some]
        return [float(kendalltau(column, means)[0]) for column in values[some].T]

    within = [value for line in lines if len(line) > 2 for value in tau(line)]
    return {"tau": float(np.mean(tau(both))), "tau_within_lines": float(np.nanmean(within))}


def left(table: SurfaceTable, probed: Sequence[Cell], values: np.ndarray, budgets: Sequence[Goal]) -> list[list[float]]:
    """Return, per probe seed, the coefficients of the probe's three parts that fit the trials best.

    Cells beyond a kind's cliff, without any unit of it, are left out.
    """
    truth = dict(zip(table.cells, np.nanmean(table.accuracies, axis=1), strict=True))
    feasible = {cell for budget in budgets for cell in budget.cells} & truth.keys()
    most = table.space.n_attn, table.space.n_act
    chosen = [i for i, c in enumerate(probed) if c in feasible and c.n_attn < most[0] and c.n_act < most[1]]
    cells, found = [probed[i] for i in chosen], []
    attn, act = np.eye(most[0] + 1)[[c.n_attn for c in cells]], np.eye(most[1] + 1)[[c.n_act for c in cells]]
    for column in values[chosen].T:
        losses = np.linalg.lstsq(np.concatenate([attn, act], axis=1), column, rcond=None)[0]
        by_attn, by_act = attn @ losses[: most[0] + 1], act @ losses[most[0] + 1 :]
        parts = np.stack([np.ones(len(cells)), by_attn, by_act, column - by_attn - by_act], axis=1)
        found.append(np.linalg.lstsq(parts, np.array([truth[cell] for cell in cells]), rcond=None)[0][1:].tolist())
    return found


def saved(location: str, cells: list[Cell]) -> float:
    """Return the share of the evaluation that shared prefixes would save."""
    plans = {Cell(row["n_attn"], row["n_act"]): PruningPlan.parse(row["plan"]) for row in read_rows(location)[0]}
    blocks = 1 + max(unit.index for plan in plans.values() for unit in plan.units)
    whole, shared, seen = 0.0, 0.0, set()
    for cell in cells:
        removed = set(plans[cell].units)
        kept = [(Unit("attn", i) not in removed, Unit("act", i) not in removed) for i in range(blocks)]
        for i, (attn, act) in enumerate(kept):
            macs = attn + (2.0 if act else 0.5)
            whole += macs
            if (prefix := tuple(kept[: i + 1])) not in seen:
                seen.add(prefix)
                shared += macs
    return 1 - shared / whole


def decided(curve: Curve) -> dict:
    """Return the cost to each target, and the regret in points above the floor at some costs."""
    found = {f"to_{target}": curve.cost_to(target) for target in TARGETS}
    for cost in REGRETS:
        regret = float(curve.mean[np.searchsorted(curve.cost, cost)]) / POINT
        found[f"regret_at_{cost:g}"] = regret if np.isfinite(regret) else None  # the probe alone costs more
    return found


if __name__ == "__main__":
    main()
