"""`tabulate --walks`: the published walks as they were sampled, every trial starting from the one before it.

Such accuracies depend on the history of their walk, so they stay sequences of their own, in walks.parquet, and never
mix with the table's, which all start alike. Every trial is one immutable file of `walks/`; its weights stay until the
next trial of its walk has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dpt_search.lease import Lease
from dpt_search.map_sampler import interleaved_walk, single_kind_walks
from dpt_search.remote import call_each, resources
from dpt_search.run import Run, commit, versions
from dpt_search.store import BadRun, RunStore
from dpt_search.table_records import SEED_STEP, Lines, Records, checked_ranking, inputs_of
from dpt_search.walk_table import NAME, SCHEMA, write_walks
from search_spaces.plan import Ranking
from search_spaces.ratios import Cell, RatioSpace
from trainables.tasks import TrialTask

FOLDER = "walks"


@dataclass(frozen=True)
class Step:
    """One trial of a walk.

    Attributes:
        walk: `dense`, `attn`, `act` or `interleaved`.
        seed: from 0, which repetition of the walk.
        step: from 0, its place in the walk.
        cell: what is removed.
        number: position among all trials; names its state while it runs.
    """

    walk: str
    seed: int
    step: int
    cell: Cell
    number: int

    @property
    def name(self) -> str:
        """Names the trial in the table."""
        return f"{self.walk}-{self.seed}-{self.step:02d}"

    @property
    def record(self) -> str:
        """Name of the trial's file."""
        return f"{self.name}.json"

    @property
    def weights(self) -> str:
        """Name of the file with what it came to."""
        return f"{FOLDER}/{self.name}.safetensors"

    @property
    def trial_seed(self) -> int:
        """The seed the trial trains with, half way between two of the table's."""
        return SEED_STEP * (1 + self.number) + SEED_STEP // 2


def walks_of(space: RatioSpace, seeds: int) -> list[list[Step]]:
    """Return every walk of every seed, each a list of its trials; the first of each starts from the dense model."""
    single = single_kind_walks(space)
    cells = {
        "dense": single[:1],
        "attn": [cell for cell in single if cell.n_attn],
        "act": [cell for cell in single if cell.n_act],
        "interleaved": interleaved_walk(space),
    }
    length, walks = sum(map(len, cells.values())), []
    for seed in range(seeds):
        number = seed * length
        for walk, along in cells.items():
            walks.append([Step(walk, seed, i, cell, number + i) for i, cell in enumerate(along)])
            number += len(along)
    return [walk for walk in walks if walk]


def tabulate_walks(run: Run, seeds: int) -> str:
    """Run the trials of the walks that are missing, and write walks.parquet; return where it is.

    Walks run side by side, each trial by trial; one whose trial fails ends there.

    Args:
        run: a run with a dense model, costs and a ranking.
        seeds: repetitions of every walk.

    Raises:
        BadRun: the run has no ranking yet, its walks run already, or the weights to go on from are gone.
        StageFailed: too many trials in a row failed.
    """
    ranking = checked_ranking(run)
    records = Records(run.store, inputs_of(run, ranking), run.config.start, folder=FOLDER)
    walks = walks_of(ranking.space, seeds)
    missing = sum(not records.has(step) for walk in walks for step in _open_part(walk, records))
    if missing:
        with Lease(RunStore(run.store.path(FOLDER))):
            _run(run, ranking, walks, records, missing)
    rows = [record for walk in walks for step in walk if (record := records.read(step)) is not None]
    place = run.store.path(NAME)
    told = [{name: row[name] for name in SCHEMA.names} for row in rows]
    write_walks(place, ranking.space, told, _provenance(run, ranking, rows, seeds))
    return place


def _open_part(walk: Sequence[Step], records: Records) -> Sequence[Step]:
    """Return a walk as far as it can go: up to the first trial that failed."""
    for i, step in enumerate(walk):
        record = records.read(step)
        if record is not None and record["accuracy"] is None:
            return walk[: i + 1]
    return walk


def _run(run: Run, ranking: Ranking, walks: Sequence[Sequence[Step]], records: Records, missing: int) -> None:
    """Run the trials that are missing, the next of every walk at a time."""
    task = run.trial_task(1, f"{FOLDER}/states")
    run.start_ray()
    lines = Lines(run.say, "walks", missing, run.config.max_failures)
    each = resources(run.config, 1, run.config.devices_per_trial)
    while True:
        ahead = [(walk, step) for walk in walks if (step := _next(walk, records)) is not None]
        if not ahead:
            break
        told = [_told(run, ranking, task, walk, step) for walk, step in ahead]
        for position, result in call_each(each, "trainables.table_trial:run_trial", told):
            walk, step = ahead[position]
            before = walk[step.step - 1] if step.step else None
            more = {
                "walk": step.walk, "step": step.step, "trial": step.name,
                "start_trial": before.name if before is not None else None,
                "chain_epochs": run.config.trial.epochs * (step.step + 1),
            }  # fmt: skip
            plan = str(ranking.plan(step.cell))
            record = records.write(step, plan, result or {"error": "its worker was lost"}, more)
            run.store.delete(f"{FOLDER}/states/{step.number:06d}.pt")
            if before is not None:
                run.store.delete(before.weights)
            lines.ended(step, record)
    run.store.delete_dir(f"{FOLDER}/states")


def _next(walk: Sequence[Step], records: Records) -> Step | None:
    """Return the first trial of a walk that has no record; None where there is none or the walk ended early."""
    return next((step for step in _open_part(walk, records) if not records.has(step)), None)


def _told(
    run: Run, ranking: Ranking, task: TrialTask, walk: Sequence[Step], step: Step
) -> tuple[TrialTask, int, str, int, str]:
    """Return what the trial's worker is told."""
    if step.step:
        before = walk[step.step - 1]
        if not run.store.exists(before.weights):
            raise BadRun(
                f"the weights of trial {before.name} are gone, and the next one starts from them: remove "
                f"{run.store.path(FOLDER)} to have the walks made again"
            )
        task = replace(task, start=run.store.path(before.weights), start_plan=str(ranking.plan(before.cell)))
    weights = "" if step is walk[-1] else run.store.path(step.weights)
    return task, step.number, str(ranking.plan(step.cell)), step.trial_seed, weights


def _provenance(run: Run, ranking: Ranking, rows: Sequence[dict[str, Any]], seeds: int) -> dict[str, Any]:
    made = next((row for row in rows if row["device"]), None)
    return {
        "configuration": asdict(run.config),
        "versions": {**versions(), **(made["versions"] if made else {})},
        "commit": commit(),
        "command": " ".join(sys.argv),
        "seeds": seeds,
        "start": run.config.start,
        "ranking": {"attn": list(ranking.attn), "act": list(ranking.act)},
        "dense_accuracy": run.store.read_json("dense/dense.json")["accuracy"],
        "images": made["images"] if made else {},
        "devices": sorted({row["device"] for row in rows if row["device"]}),
        "failed": {row["trial"]: row["error"] for row in rows if row["error"]},
    }
