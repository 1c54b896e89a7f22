"""The rung of the ladder after the probe: does a search decide better where its trials start from the probe's weights?

    python benchmarks/start_rung.py TABLE TABLE_FROM_PROBE [--seeds 54] [--max-trials 18]

Both are surfaces of one model that `dpt-search tabulate` wrote, the second with `--start probe`; each has its probes
beside it. The first is cut down to the cells and the number of seeds of the second. `map/probe` is replayed on both,
all default budgets at once, each judged by its own other seeds: what a start is worth to the accuracy itself is for
`start_worth.py` to say. Costs are in trials of the dense model, regrets in points above the noise floor.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
from scipy.stats import kendalltau

from dpt_search.compare import POINT, table_noise
from dpt_search.compare_report import TARGETS, beside, budgets_of
from dpt_search.curves import mean_curve
from dpt_search.probe_seeds import read_probes
from dpt_search.replays import compare
from dpt_search.surface_table import SurfaceTable, read_table

OUT = Path(__file__).parent / "results" / "start_rung.json"
STRATEGY = "map/probe"
REGRETS = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
"""Costs at which regret is told."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("probe")
    parser.add_argument("--seeds", type=int, default=54)
    parser.add_argument("--max-trials", type=int, default=18)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    from_probe = read_table(args.probe)
    tables = {args.dense: cut(read_table(args.dense), from_probe), args.probe: from_probe}
    found = {place: decided(table, place, args.seeds, args.max_trials) for place, table in tables.items()}
    means = [np.nanmean(table.accuracies, axis=1) for table in tables.values()]
    found["tau of one to the other"] = float(kendalltau(*means)[0])
    for name, value in found.items():
        print(name, value)
    OUT.write_text(json.dumps({"seeds": args.seeds, "max_trials": args.max_trials, **found}, indent=1) + "\n")


def cut(table: SurfaceTable, other: SurfaceTable) -> SurfaceTable:
    """Return a table's part that another has too: its cells, and as many seeds."""
    kept = [table.cells.index(cell) for cell in other.cells]
    accuracies = table.accuracies[kept, : other.accuracies.shape[1]]
    return replace(table, cells=other.cells, accuracies=accuracies, costs=table.costs[kept])


def decided(table: SurfaceTable, place: str, seeds: int, max_trials: int) -> dict:
    budgets, probes = budgets_of("", table.space), read_probes(beside(place, "probes"))
    assert probes is not None, f"no probes lie beside {place}"
    told = {"seeds": seeds, "workers": 1, "max_trials": max_trials, "processes": os.cpu_count() or 1}
    traces = compare(table, [STRATEGY], budgets, probes=probes, **told)[STRATEGY]
    curve = mean_curve(STRATEGY, traces, np.arange(0.5, max_trials, 0.5))
    return {
        "noise": table_noise(table) / POINT,
        "floor": float(np.mean([trace.floor.mean() for group in traces for trace in group])) / POINT,
        "mean accuracy": float(np.nanmean(table.accuracies)),
        **{f"to {target}": curve.cost_to(target) for target in TARGETS},
        **{f"regret at {cost:g}": float(curve.mean[np.searchsorted(curve.cost, cost)]) / POINT for cost in REGRETS},
    }


if __name__ == "__main__":
    main()
