"""What does the ranking cost? A cell's plan by the ranking against other plans of the same cell, each one trained.

    python benchmarks/plan_regret.py [--cells 4,4 2,6 6,4] [--work runs/plan_regret]

Plans of a cell: the ranking's; the conditional ranking's; random ones; conditional rankings made on other images
(greedy); and joint ones, which take attention and activation from the same blocks as far as the counts allow. Each is
trained as a trial of `tabulate` is, with several seeds, on one thread. Every trial and every ranking is a file of
--work, so that a start that was killed goes on. Sizes are those of the embedded run unless they are given.

Plan regret is the accuracy lost by taking the ranking's plan instead of the best: the best by all seeds but one, less
the ranking's, both on that one, and the mean of this over the seeds. Choosing and judging on different seeds takes the
selection's flattery out. Its standard error is that of the trials' noise, with the plans chosen as they were.
"""

import argparse
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from plan_verdict import Records, accuracies, judged, noise_of, said

from dpt_search.config import RunConfig, check
from dpt_search.options import read_config
from dpt_search.remote import call_each, resources
from dpt_search.run import Run, digest_of, identity_of, versions
from dpt_search.store import RunStore
from search_spaces import BadInput
from search_spaces.plan import PruningPlan, Ranking
from search_spaces.ratios import Cell, RatioSpace
from trainables.tasks import RankTask, TrialTask

OUT = Path(__file__).parent / "results" / "plan_regret.json"
Plans = dict[str, list[PruningPlan]]
"""The plans of one cell by kind; the ranking's own comes first."""


@dataclass(frozen=True)
class Counts:
    """How many plans of each kind with a choice, and how many trials of each plan."""

    random: int = 20
    greedy: int = 5
    joint: int = 5
    seeds: int = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["4,4", "2,6", "6,4"], help="attentions,activations of each cell")
    for name, count in asdict(Counts()).items():
        parser.add_argument(f"--{name}", type=int, default=count)
    embedded = read_config("run", [])
    parser.add_argument("--subset", type=int, default=embedded.data.subset)
    parser.add_argument("--epochs", type=int, default=embedded.trial.epochs)
    parser.add_argument("--val-limit", type=int, default=embedded.data.val_limit)
    parser.add_argument("--rank-batches", type=int, default=embedded.rank_batches)
    parser.add_argument("--work", default="runs/plan_regret", help="where trials and rankings are kept")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    counts = Counts(args.random, args.greedy, args.joint, args.seeds)
    if counts.seeds < 2:
        parser.error("--seeds must be at least 2: one judges what the others chose")
    try:
        config = configuration(args.subset, args.epochs, args.val_limit, args.rank_batches)
        found = measure(config, [cell_of(text) for text in args.cells], counts, args.work)
    except BadInput as error:
        parser.exit(2, f"plan_regret: {error}\n")
    for name, cell in found["cells"].items():
        print(f"\n{said(name, cell)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


def configuration(subset: int, epochs: int, val_limit: int, rank_batches: int) -> RunConfig:
    """Return the embedded run's, with these sizes."""
    config = read_config("run", [])
    config = replace(
        config,
        data=replace(config.data, subset=subset, val_limit=val_limit),
        trial=replace(config.trial, epochs=epochs),
        rank_batches=rank_batches,
    )
    check(config)
    return config


def cell_of(text: str) -> Cell:
    try:
        n_attn, n_act = map(int, text.split(","))
        return Cell(n_attn, n_act)
    except ValueError:
        raise BadInput(f"cannot read the cell {text!r}: write 4,4 for four attentions and four activations") from None


def measure(config: RunConfig, cells: Sequence[Cell], counts: Counts, work: str) -> dict[str, Any]:
    """Rank, train what is missing, and judge."""
    # Other sizes are other trials: a folder of their own.
    store = RunStore(f"{work}/{digest_of(identity_of(config))}")
    with Run(config, store, lambda line: print(line, flush=True)) as run:
        own = ranked(run, "taylor", config.seed)
        check_cells(cells, own)
        # The conditional ranking, and those on other images.
        others = [ranked(run, "conditional", config.seed + number) for number in range(counts.greedy + 1)]
        rankings = [own, *others]
        plans = {cell: plans_of(cell, rankings, config.seed, counts) for cell in cells}
        train(run, [plan for kinds in plans.values() for each in kinds.values() for plan in each], counts.seeds)
    records = {cell: records_of(store, plans[cell], counts.seeds) for cell in cells}
    rows = {each[0]["plan"]: each for kinds in records.values() for of in kinds.values() for each in of}
    noise = noise_of([accuracies(each) for each in rows.values()])
    first = next((record for each in rows.values() for record in each if not record["error"]), {})
    about = {"cpu": first.get("device", ""), "cores": os.cpu_count(), "threads": 1, **versions()}
    sizes = {"images": first.get("images", {}), "recipe": asdict(config.trial), "rank_batches": config.rank_batches}
    return {
        "about": {**about, **first.get("versions", {})},
        "settings": {**asdict(counts), **sizes, "rankings": rankings},
        "noise": noise,
        "cells": {str(cell): judged(records[cell], noise) for cell in cells},
    }


def check_cells(cells: Sequence[Cell], own: dict[str, Any]) -> None:
    """Refuse cells that remove more than there is."""
    space = RatioSpace(len(own["attn"]), len(own["act"]))
    for cell in cells:
        if cell not in space:
            raise BadInput(f"cell {cell} removes more units than there are: {space.n_attn} attn, {space.n_act} act")


def ranked(run: Run, method: str, seed: int) -> dict[str, Any]:
    """Return a ranking as ranking.json has it, made when it is not there yet."""
    name = f"ranking-{method}-{seed}.json"
    if not run.store.exists(name):
        run.say(f"ranking: {method}, seed {seed}")
        task = RankTask(**run.task() | {"seed": seed}, batches=run.config.rank_batches, method=method)
        run.store.write_json(name, run.call("trainables.importance:rank", task))
    found: dict[str, Any] = run.store.read_json(name)
    return found


def plans_of(cell: Cell, rankings: Sequence[dict[str, Any]], seed: int, counts: Counts) -> Plans:
    """Return the plans of a cell.

    Args:
        cell: how many units of each kind go.
        rankings: as ranking.json has them: the run's own, the conditional one, and conditional ones on other images.
        seed: of the draws.
        counts: how many.
    """
    own, *others = [Ranking(tuple(found["attn"]), tuple(found["act"])) for found in rankings]
    rng = np.random.default_rng([seed, cell.n_attn, cell.n_act])
    return {
        "ranking": [own.plan(cell)],
        "conditional": [others[0].plan(cell)],
        "random": random_plans(own, cell, rng, counts.random),
        "greedy": [other.plan(cell) for other in others[1:]],
        "joint": joint_plans(rankings[0], cell, rng, counts.joint),
    }


def random_plans(ranking: Ranking, cell: Cell, rng: np.random.Generator, count: int) -> list[PruningPlan]:
    """Draw distinct plans, as many as there are at most."""
    attn = list(combinations(sorted(ranking.attn), cell.n_attn))
    act = list(combinations(sorted(ranking.act), cell.n_act))
    drawn = rng.choice(len(attn) * len(act), min(count, len(attn) * len(act)), replace=False)
    return [PruningPlan(attn[i // len(act)], act[i % len(act)]) for i in drawn.tolist()]


def joint_plans(found: dict[str, Any], cell: Cell, rng: np.random.Generator, count: int) -> list[PruningPlan]:
    """Return plans that take both kinds from the same blocks: the least important blocks, then blocks drawn at random.

    A block's importance is the sum of its units', each as a share of all of its kind.
    """
    shares: dict[int, float] = {}
    for kind in ("attn", "act"):
        total = sum(found["importance"][kind]) or 1.0
        for index, value in zip(found[kind], found["importance"][kind], strict=True):
            shares[index] = shares.get(index, 0.0) + value / total
    order = sorted(shares, key=lambda block: (shares[block], block))
    plans: list[PruningPlan] = []
    for _ in range(count):
        attn, act = ([block for block in order if block in found[kind]] for kind in ("attn", "act"))
        plans.append(PruningPlan(tuple(attn[: cell.n_attn]), tuple(act[: cell.n_act])))
        order = [order[i] for i in rng.permutation(len(order))]
    return plans


def train(run: Run, plans: Iterable[PruningPlan], seeds: int) -> None:
    """Run the trials that have no record, seed by seed; each is recorded as it ends."""
    texts = dict.fromkeys(map(str, plans))
    missing = [(p, seed) for seed in range(seeds) for p in texts if not run.store.exists(record_name(p, seed))]
    if not missing:
        return
    run.start_ray()
    run.say(f"{len(missing)} trials to run")
    task = TrialTask(**run.task(threads=1), recipe=run.config.trial, checkpoints=run.store.path("states"))
    told = [(task, trial_seed(*each), each[0], trial_seed(*each)) for each in missing]
    wanted = resources(run.config, 1, run.config.devices_per_trial)
    for done, (position, result) in enumerate(call_each(wanted, "trainables.table_trial:run_trial", told), 1):
        plan, seed = missing[position]
        record = {"plan": plan, "seed": seed, **(result or {"error": "its worker was lost"})}
        run.store.write_json(record_name(plan, seed), record)
        run.store.delete(f"states/{trial_seed(plan, seed):06d}.pt")
        how = f"failed: {record['error']}" if record["error"] else f"val {record['accuracies'][-1]:.1%}"
        run.say(f"{plan} seed {seed}: {how}; {done} of {len(missing)} done")


def record_name(plan: str, seed: int) -> str:
    return f"trials/{plan.translate(str.maketrans(':, ', '--_'))}-{seed}.json"


def trial_seed(plan: str, seed: int) -> int:
    """Return what a trial trains with, and what names its state: its own, whatever else is asked for."""
    return zlib.crc32(f"{plan} {seed}".encode()) >> 1


def records_of(store: RunStore, plans: Plans, seeds: int) -> Records:
    """Return the records of a cell's trials."""
    return {
        kind: [[store.read_json(record_name(str(plan), seed)) for seed in range(seeds)] for plan in of]
        for kind, of in plans.items()
    }


if __name__ == "__main__":
    main()
