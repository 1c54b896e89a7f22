"""Should trials, and the long fine-tune, start from the dense model's weights or from the probe's?

    dpt-search dense runs/cifar10 --config benchmarks/tables/cifar10.yaml     # so too profile, rank and probe
    python benchmarks/start_worth.py runs/cifar10 [--cells 16] [--seeds 2] [--long-cells 4] [--long-seeds 2]

The run has its dense model, ranking and probe done. Well-spread cells of its budgets are trained as its trials are,
from both starts, and a few of them as its long fine-tune is. The probe is made anyway, for what it says of the cells,
so both starts have cost the same; a trial's seed, and with it the order of the images and their augmentation, is the
same for both, so that differences are paired. A short trial is to tell good cells from worse: of each start, the noise
of a trial, and Kendall's tau between a trial and the mean of the others of its start. Every trial is a file of the
run's folder `start_worth`, so that a start that was killed goes on. All runs in this process, on one thread.
"""

import argparse
import json
import os
import platform
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from removal_semantics import accuracies, in_points, interval, kept
from scipy.stats import kendalltau

from dpt_search.compare_report import budgets_of
from dpt_search.options import recorded_config
from dpt_search.run import Run, configured_run, read_ranking, versions
from search_spaces import BadInput
from search_spaces.plan import PruningPlan
from search_spaces.ratios import Cell, RatioSpace, spread
from trainables.devices import describe
from trainables.settings import DataSettings, Recipe
from trainables.tasks import TrialTask

OUT = Path(__file__).parent / "results" / "start_worth"
PROBE = "probe/model.safetensors"
STARTS = {"dense": "", "probe": PROBE}
"""The weights that a trial starts from, by the name `--start` has for them."""
Records = dict[str, list[list[dict[str, Any]]]]
"""The records of trials by start, by cell, by seed."""


@dataclass(frozen=True)
class Job:
    """Trainings of one length: of every cell and start as many as there are seeds."""

    name: str
    recipe: Recipe
    data: DataSettings
    cells: Sequence[Cell]
    seeds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--cells", type=int, default=16, help="how many cells")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--long-cells", type=int, default=4, help="how many of them to train for long too")
    parser.add_argument("--long-epochs", type=int, default=0, help="0: those of the run's long fine-tune")
    parser.add_argument("--long-images", type=int, default=0, help="0: all training images")
    parser.add_argument("--long-seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="left out: results/start_worth/RUN.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if min(args.seeds, args.long_seeds) < 2:
            raise BadInput("--seeds and --long-seeds must be at least 2: one judges the others")
        with configured_run(recorded_config(args.run), lambda line: print(line, flush=True)) as run:
            found = measure(run, args)
    except BadInput as error:
        parser.exit(2, f"start_worth: {error}\n")
    print(said(found))
    out = args.out or OUT / f"{Path(args.run).name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


def measure(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, and judge."""
    ranking, config = read_ranking(run), run.config
    if not run.store.exists(PROBE):
        raise BadInput(f"there is no {PROBE} in {config.run_dir!r}: run `dpt-search probe` on it first")
    cells = cells_of(ranking.space, args.cells)
    long = replace(config.finetune, epochs=args.long_epochs or config.finetune.epochs)
    long_data = replace(config.data, subset=args.long_images)
    jobs = [
        Job("short", config.trial, config.data, cells, args.seeds),
        Job("long", long, long_data, long_cells(cells, args.long_cells), args.long_seeds),
    ]
    records: dict[str, Records] = {}
    for job in jobs:
        # Seed by seed, so that what is there of a start that was killed says something.
        for seed in range(job.seeds):
            for cell in job.cells:
                for start in STARTS:
                    trained(run, job, ranking.plan(cell), seed, start)
        records[job.name] = {
            start: [[trained(run, job, ranking.plan(c), s, start) for s in range(job.seeds)] for c in job.cells]
            for start in STARTS
        }
    return {
        "about": {
            "command": " ".join(sys.argv), "cpu": describe(torch.device("cpu")), "cores": os.cpu_count(),
            "threads": 1, "system": platform.platform(), **versions(),
        },
        "settings": {
            "trial": asdict(config.trial), "subset": config.data.subset, "long": asdict(long),
            "long_images": args.long_images, "probe_epochs": config.epochs_of_probe,
        },
        "lengths": {job.name: judged(job, records[job.name]) for job in jobs if job.cells},
    }  # fmt: skip


def cells_of(space: RatioSpace, count: int) -> list[Cell]:
    """Return well-spread cells of the default budgets."""
    return spread(space, [cell for budget in budgets_of("", space) for cell in budget.cells])[:count]


def long_cells(cells: Sequence[Cell], count: int) -> list[Cell]:
    """Return so many of the cells, from the fewest units to the most."""
    ordered = sorted(cells, key=lambda cell: (cell.total, cell))
    places = dict.fromkeys(np.linspace(0, len(ordered) - 1, count).round().astype(int).tolist())
    return [ordered[place] for place in places]


def trained(run: Run, job: Job, plan: PruningPlan, seed: int, start: str) -> dict[str, Any]:
    """Return the record of a trial, run when it is not there yet.

    Raises:
        BadInput: it failed.
    """
    number = zlib.crc32(f"{plan} {job.recipe} {job.data.subset} {seed} {start}".encode()) >> 1
    name = f"start_worth/{job.name}-{plan.cell.n_attn}-{plan.cell.n_act}-{seed}-{start}-{number:08x}.json"
    weights = STARTS[start] and run.store.path(STARTS[start])
    told = run.task() | {"data": job.data}
    task = TrialTask(**told, recipe=job.recipe, checkpoints=run.store.path("states"), start=weights)
    return kept(run, name, task, number, plan, seed, f"{job.name} {plan.cell} seed {seed} from {start}")


def judged(job: Job, records: Records) -> dict[str, Any]:
    """Return accuracies, what the probe's start is better by, and how well trials of each tell the cells apart."""
    by_start = {start: np.stack([accuracies(of) for of in cells]) for start, cells in records.items()}
    # The mean over a cell's seeds, so that cells count as draws: what is asked is about cells to come.
    over = by_start["probe"].mean(axis=1) - by_start["dense"].mean(axis=1)
    return {
        "epochs": job.recipe.epochs,
        "cells": [str(cell) for cell in job.cells],
        "accuracies": {start: of.tolist() for start, of in by_start.items()},
        "probe_over_dense": interval(over),
        "by_cell": dict(zip(map(str, job.cells), over.tolist(), strict=True)),
        "noise": {start: float(np.sqrt(of.var(axis=1, ddof=1).mean())) for start, of in by_start.items()},
        "tau": {start: tau_between_seeds(of) for start, of in by_start.items()},
    }


def tau_between_seeds(of: np.ndarray) -> float:
    """Return Kendall's tau between each seed's trials, [cells, seeds], and the mean of the others, averaged."""
    seeds = range(of.shape[1])
    return float(np.mean([kendalltau(of[:, s], np.delete(of, s, axis=1).mean(axis=1)).statistic for s in seeds]))


def said(found: dict[str, Any]) -> str:
    """Return what was found as text; accuracies in per cent, differences in points."""
    lines = []
    for name, of in found["lengths"].items():
        lines.append(f"\n{name}, {of['epochs']} epochs, {len(of['cells'])} cells")
        for start in STARTS:
            lines.append(
                f"  from {start}: {np.mean(of['accuracies'][start]):.2%}, noise of a trial "
                f"{100 * of['noise'][start]:.2f} points, tau between seeds {of['tau'][start]:.2f}"
            )
        lines.append(f"  probe over dense: {in_points(of['probe_over_dense'])} points")
        lines.append("  by cell: " + ", ".join(f"{cell} {100 * by:+.2f}" for cell, by in of["by_cell"].items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
