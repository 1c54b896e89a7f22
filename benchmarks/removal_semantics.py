"""What should stay of a removed attention? Zero, identity and double, trained and timed in the same cells.

    python benchmarks/removal_semantics.py [--cells 3,3 6,0 6,6 9,4] [--seeds 3] [--long-cells 6,6] [--long-epochs 6]
        [--work runs/removal_semantics]

Each has a ranking of its own and the embedded run's recipe; a trial's seed, and with it the order of the images and
their augmentation, is the same for all three, so that differences are paired. With --long-epochs the cells of
--long-cells are trained for so many epochs too, with --long-seeds seeds. Every ranking and trial is a file of --work,
so that a start that was killed goes on. Everything runs in this process, on one thread.

Speed is that of the merged models, those of a cell and the dense one timed in turn; a speedup is a median over rounds.
What is slower than `zero` in a cell is charged for it: its accuracy is corrected by the slope of accuracy over speedup
there, to what it would be at zero's speed. The slope is that from the nearest cell measured that removes no more of
either kind (or the dense model, in speed and in accuracy) to this cell, both with `zero`.
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
from typing import Any, get_args

import numpy as np
import torch
from plan_regret import cell_of
from scipy import stats

from dpt_search.config import RunConfig, check
from dpt_search.options import read_config
from dpt_search.run import Run, digest_of, identity_of, versions
from dpt_search.store import RunStore
from search_spaces import BadInput
from search_spaces.plan import Attention, PruningPlan, Ranking
from search_spaces.ratios import Cell
from trainables.dense_check import check_dense
from trainables.devices import describe
from trainables.importance import rank
from trainables.intervals import median_interval
from trainables.table_trial import run_trial
from trainables.tasks import RankTask, Task, TrialTask
from trainables.timing import calls_of, calls_within, merged_without
from trainables.workspace import Workspace

OUT = Path(__file__).parent / "results" / "removal_semantics.json"
SEMANTICS: tuple[Attention, ...] = get_args(Attention)
DENSE = Cell(0, 0)
Rows = dict[Cell, dict[Attention, list[dict[str, Any]]]]
"""The records of trials by cell and semantics, by seed."""


@dataclass(frozen=True)
class Job:
    """Trainings of one length: of every cell and semantics as many as there are seeds."""

    epochs: int
    seeds: int
    cells: tuple[Cell, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["3,3", "6,0", "6,6", "9,4"], help="attentions,activations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--long-cells", nargs="*", default=["6,6"], help="cells to train for --long-epochs too")
    parser.add_argument("--long-epochs", type=int, default=0, help="0 trains nothing for longer")
    parser.add_argument("--long-seeds", type=int, default=2)
    embedded = read_config("run", [])
    parser.add_argument("--subset", type=int, default=embedded.data.subset)
    parser.add_argument("--epochs", type=int, default=embedded.trial.epochs)
    parser.add_argument("--val-limit", type=int, default=embedded.data.val_limit)
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, for each cell and batch size")
    parser.add_argument("--work", default="runs/removal_semantics", help="where rankings and trials are kept")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    try:
        config = replace(
            embedded,
            data=replace(embedded.data, subset=args.subset, val_limit=args.val_limit),
            trial=replace(embedded.trial, epochs=args.epochs),
        )
        check(config)
        if min(args.seeds, args.long_seeds) < 2:
            raise BadInput("--seeds and --long-seeds must be at least 2: differences need an error")
        jobs = [Job(args.epochs, args.seeds, tuple(map(cell_of, args.cells)))]
        if args.long_epochs:
            jobs.append(Job(args.long_epochs, args.long_seeds, tuple(map(cell_of, args.long_cells))))
        found = measure(config, jobs, args.seconds, args.work)
    except BadInput as error:
        parser.exit(2, f"removal_semantics: {error}\n")
    print(said(found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(config: RunConfig, jobs: Sequence[Job], seconds: float, work: str) -> dict[str, Any]:
    """Rank, train what is missing, time, and judge."""
    torch.set_num_threads(1)
    runs = {each: run_of(replace(config, attention=each), work) for each in SEMANTICS}
    rankings = {each: ranked(run) for each, run in runs.items()}
    # Seed by seed, so that what is there of a start that was killed says something.
    for job in jobs:
        for seed in range(job.seeds):
            for cell in job.cells:
                for each, run in runs.items():
                    trained(run, rankings[each].plan(cell), seed, job.epochs)
    every = sorted({cell for job in jobs for cell in job.cells})
    timing = {cell: timed(config, {a: rankings[a].plan(cell) for a in SEMANTICS}, seconds) for cell in every}
    dense = check_dense(task_of(runs["zero"]))["accuracy"]
    lengths = []
    for job in jobs:
        rows: Rows = {
            cell: {
                a: [trained(runs[a], rankings[a].plan(cell), seed, job.epochs) for seed in range(job.seeds)]
                for a in SEMANTICS
            }
            for cell in job.cells
        }
        lengths.append({"epochs": job.epochs, "seeds": job.seeds, **judged(rows, timing, dense)})
    return {
        "about": {
            "command": " ".join(sys.argv), "cpu": describe(torch.device("cpu")), "cores": os.cpu_count(),
            "threads": 1, "system": platform.platform(), **versions(),
        },
        "settings": {"recipe": asdict(config.trial), "subset": config.data.subset},
        "rankings": {each: asdict(ranking) for each, ranking in rankings.items()},
        "dense_accuracy": dense,
        "timing": {str(cell): timing[cell] for cell in every},
        "trainings": lengths,
    }  # fmt: skip


def run_of(config: RunConfig, work: str) -> Run:
    # Other settings are other trials: a folder of their own.
    store = RunStore(f"{work}/{config.attention}-{digest_of(identity_of(config))}")
    return Run(config, store, lambda line: print(line, flush=True))


def task_of(run: Run) -> Task:
    return Task(**run.task())


def ranked(run: Run) -> Ranking:
    """Return the ranking, made when it is not there yet."""
    if not run.store.exists("ranking.json"):
        run.store.write_json("ranking.json", rank(RankTask(**run.task(), batches=run.config.rank_batches)))
    found = run.store.read_json("ranking.json")
    return Ranking(tuple(found["attn"]), tuple(found["act"]))


def trained(run: Run, plan: PruningPlan, seed: int, epochs: int) -> dict[str, Any]:
    """Return the record of a trial, run when it is not there yet.

    Raises:
        BadInput: it failed.
    """
    recipe = replace(run.config.trial, epochs=epochs)
    task = TrialTask(**run.task(), recipe=recipe, checkpoints=run.store.path("states"))
    name = f"trials/{str(plan).translate(str.maketrans(':, ', '--_'))}-{epochs}-{seed}.json"
    number = zlib.crc32(f"{plan} {epochs} {seed}".encode()) >> 1
    return kept(run, name, task, number, plan, seed, f"{run.config.attention} {plan.cell} seed {seed}, {epochs} epochs")


def kept(run: Run, name: str, task: TrialTask, number: int, plan: PruningPlan, seed: int, what: str) -> dict[str, Any]:
    """Return the record `name` of a trial, run when it is not there yet.

    Its seed is the same for all that is compared: cell, plan, and what stays or is started from are not in it.

    Raises:
        BadInput: it failed.
    """
    if not run.store.exists(name):
        record = run_trial(task, number, str(plan), 1000 * (1 + seed))
        if record["error"]:
            raise BadInput(f"the trial {plan}, seed {seed}, failed: {record['error']}")
        run.store.write_json(name, record)
        run.store.delete(f"states/{number:06d}.pt")
        run.say(f"{what}: val {record['accuracies'][-1]:.2%}, {record['seconds']:.0f} s")
    found: dict[str, Any] = run.store.read_json(name)
    return found


def timed(config: RunConfig, plans: dict[Attention, PruningPlan], seconds: float) -> dict[str, Any]:
    """Time the merged models of one cell and the dense one in turn; by semantics and batch size, the speedup."""
    workspace = Workspace(Task(**run_of(config, "").task()))
    models = [workspace.dense, *(merged_without(workspace.dense, plan, each) for each, plan in plans.items())]
    found: dict[str, Any] = {each: {"plan": str(plan)} for each, plan in plans.items()}
    for batch in (64, 1):
        pixels = torch.randn(batch, *workspace.view.input_size)
        rounds = calls_within(seconds, calls_of(models, pixels), pixels.device)
        for column, each in enumerate(plans, 1):
            speedup, low, high = median_interval(list(rounds[:, 0] / rounds[:, column]))
            found[each][str(batch)] = {"speedup": speedup, "low": low, "high": high, "rounds": len(rounds)}
    return found


def judged(rows: Rows, timing: dict[Cell, Any], dense: float) -> dict[str, Any]:
    """Return accuracies, corrections and paired differences from `zero`, by cell and over all of them."""
    zero = {cell: accuracies(of["zero"]).mean() for cell, of in rows.items()}
    points = {DENSE: (1.0, dense)} | {c: (timing[c]["zero"]["64"]["speedup"], zero[c]) for c in rows}
    cells: dict[str, Any] = {}
    differences: dict[Attention, list[Any]] = {each: [] for each in SEMANTICS[1:]}
    for cell, of in rows.items():
        slope = slope_at(cell, points)
        found: dict[str, Any] = {}
        for each, records in of.items():
            slower = points[cell][0] - timing[cell][each]["64"]["speedup"]
            correction = slope * slower
            found[each] = {
                "accuracies": accuracies(records).tolist(),
                "mean": float(accuracies(records).mean()),
                "removed_accuracy": float(np.mean([record["removed_accuracy"] for record in records])),
                "correction": correction,
                "at_equal_speed": float(accuracies(records).mean() + correction),
            }
            if each != "zero":
                paired = accuracies(records) + correction - accuracies(of["zero"])
                found[each]["over_zero"] = interval(paired)
                differences[each].append(paired)
        cells[str(cell)] = {"slope": slope, **found}
    return {"cells": cells, "over_zero": {each: interval(np.concatenate(of)) for each, of in differences.items()}}


def accuracies(records: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([record["accuracies"][-1] for record in records])


def slope_at(cell: Cell, points: dict[Cell, tuple[float, float]]) -> float:
    """Return accuracy over speedup from the nearest point that removes no more of either kind; never above 0."""
    within = [c for c in points if c != cell and c.n_attn <= cell.n_attn and c.n_act <= cell.n_act]
    (speed, accuracy), (speed_before, before) = points[cell], points[max(within, key=lambda c: (c.total, c))]
    return min(0.0, (accuracy - before) / max(speed - speed_before, 1e-9))


def interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean with its 95 % interval by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    mean = float(values.mean())
    return {"mean": mean, "low": mean - float(half), "high": mean + float(half), "number": len(values)}


def said(found: dict[str, Any]) -> str:
    """Return the tables as text; accuracies in per cent, differences in points."""
    lines = []
    for training in found["trainings"]:
        lines.append(f"\n{training['epochs']} epochs")
        for cell, of in training["cells"].items():
            for each in SEMANTICS:
                row, speed = of[each], found["timing"][cell][each]["64"]["speedup"]
                over = f", over zero {in_points(row['over_zero'])}" if "over_zero" in row else ""
                lines.append(
                    f"{cell:>6} {each:8} right after removal {row['removed_accuracy']:.2%}, trained {row['mean']:.2%}, "
                    f"{speed:.3f}x, at zero's speed {row['at_equal_speed']:.2%}{over}"
                )
        lines += [f"{each} over zero, all cells: {in_points(of)}" for each, of in training["over_zero"].items()]
    return "\n".join(lines)


def in_points(found: dict[str, float]) -> str:
    return f"{100 * found['mean']:+.2f} ({100 * found['low']:+.2f} to {100 * found['high']:+.2f})"


if __name__ == "__main__":
    main()
