"""`tabulate`: a table of a run's real surface, every cell tried with several seeds.

Every trial is one immutable file of `table/`, so that a start, of whatever shard, repeats none that is there. The
trials run as those of the search do, without its sampler.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from dpt_search.config import BadConfig, RunConfig, check_same_run
from dpt_search.lease import Lease
from dpt_search.progress import duration
from dpt_search.remote import StageFailed, call_each, resources
from dpt_search.run import Run, commit, digest_of, identity_of, read_ranking, versions
from dpt_search.store import BadRun, RunStore
from dpt_search.surface_table import NAME, SCHEMA, read_rows, write_table
from search_spaces import BadInput
from search_spaces.plan import Ranking
from search_spaces.ratios import Cell, RatioSpace, spread
from trainables.tasks import TrialTask

FOLDER = "table"
SEED_STEP = 1000
"""Apart are the seeds of two trials: an epoch's order is seeded by the trial's seed plus the epoch."""


@dataclass(frozen=True)
class Job:
    """One trial of the table.

    Attributes:
        cell: what is removed.
        seed: from 0; the seeds of a cell are its repetitions.
        number: position among all cells and seeds; names the trial's state while it runs.
    """

    cell: Cell
    seed: int
    number: int

    @property
    def record(self) -> str:
        """Name of the trial's file."""
        return f"{self.cell.n_attn:02d}-{self.cell.n_act:02d}-{self.seed}.json"

    @property
    def trial_seed(self) -> int:
        """The seed the trial trains with: no two trials share one, so that their noise is independent."""
        return SEED_STEP * (1 + self.number)


def parse_shard(text: str) -> tuple[int, int]:
    """Read `I/N`: every N-th trial from the I-th on, counted from 0.

    Raises:
        BadInput: it is not of that form.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise BadInput(f"cannot read the shard {text!r}: write 0/4, 1/4, 2/4 or 3/4 for a quarter of the trials each")
    return int(found[1]), int(found[2])


def wanted_cells(space: RatioSpace, cells: str) -> list[Cell]:
    """Return all cells of the lattice, or those that remove an even number of units, well spread ones first."""
    return spread(space, [cell for cell in space if cells == "all" or cell.total % 2 == 0])


def jobs_of(space: RatioSpace, cells: str, seeds: int) -> list[Job]:
    """Return all trials of a request, in order: seed by seed, well spread cells first."""
    position = {cell: index for index, cell in enumerate(space)}
    ordered = wanted_cells(space, cells)
    return [Job(cell, seed, seed * len(space) + position[cell]) for seed in range(seeds) for cell in ordered]


def close_jobs(space: RatioSpace, means: Mapping[Cell, float], points: float, seeds: range) -> list[Job]:
    """Return further trials of the cells that come close to the best of their line, seed by seed.

    Args:
        space: the lattice.
        means: mean accuracy of each cell of the table.
        points: how close.
        seeds: of the further trials.
    """
    position = {cell: index for index, cell in enumerate(space)}
    best = {total: max(m for c, m in means.items() if c.total == total) for total in {c.total for c in means}}
    close = [cell for cell, mean in means.items() if mean >= best[cell.total] - 0.01 * points]
    return [Job(cell, seed, seed * len(space) + position[cell]) for seed in seeds for cell in close]


@dataclass(frozen=True)
class Request:
    """What a table is to hold.

    Attributes:
        cells: `all`, or `even` for those that remove an even number of units.
        seeds: trials per cell.
        close_seeds: trials of the cells that come close to the best of their line; 0 for no more than of others.
        close: how close that is, in points.
    """

    cells: str = "all"
    seeds: int = 3
    close_seeds: int = 0
    close: float = 0.5


def tabulate(run: Run, request: Request, shard: tuple[int, int]) -> str:
    """Run the trials of a shard that are missing; write the table once those of all shards are there.

    Trials that the run's table has already, made from the same inputs, are not run again.

    Args:
        run: a run with a dense model, costs and a ranking.
        request: what the table is to hold.
        shard: (I, N): every N-th trial from the I-th on.

    Returns:
        Where the table is; empty while other shards have trials to run.

    Raises:
        BadRun: the run has no ranking yet, or the shard runs already.
        StageFailed: too many trials in a row failed.
    """
    ranking = _checked_ranking(run)
    inputs = digest_of([identity_of(run.config), asdict(ranking)])
    records = Records(run.store, inputs, run.config.start, _known_rows(run, ranking))
    jobs = jobs_of(ranking.space, request.cells, request.seeds)
    rows = _complete(run, ranking, jobs, records, shard)
    if rows and request.close_seeds > request.seeds:
        further = range(request.seeds, request.close_seeds)
        jobs += close_jobs(ranking.space, _means(rows), request.close, further)
        rows = _complete(run, ranking, jobs, records, shard)
    if not rows:
        return ""
    place = run.store.path(NAME)
    write_table(place, ranking.space, [_row(r) for r in rows], _provenance(run, ranking, rows, request))
    return place


def _complete(
    run: Run, ranking: Ranking, jobs: list[Job], records: Records, shard: tuple[int, int]
) -> list[dict[str, Any]]:
    """Run a shard's missing trials and return all rows; none while other shards have trials to run."""
    missing = [job for job in jobs[shard[0] :: shard[1]] if not records.has(job)]
    if missing:
        _run_missing(run, ranking, missing, records, shard)
    rows = [record for job in jobs if (record := records.read(job)) is not None]
    if len(rows) == len(jobs):
        return rows
    run.say(f"table: {len(rows)} of {len(jobs)} trials are there; the other shards have the rest")
    return []


def _means(rows: list[dict[str, Any]]) -> dict[Cell, float]:
    found: dict[Cell, list[float]] = {}
    for row in rows:
        if row["accuracy"] is not None:
            found.setdefault(Cell(row["n_attn"], row["n_act"]), []).append(row["accuracy"])
    return {cell: fmean(accuracies) for cell, accuracies in found.items()}


def _known_rows(run: Run, ranking: Ranking) -> list[dict[str, Any]]:
    """Return the trials of the run's table, where it was made with this configuration and ranking."""
    if not run.store.exists(NAME):
        return []
    rows, provenance = read_rows(run.store.path(NAME))
    made = {kind: tuple(provenance["ranking"][kind]) for kind in ("attn", "act")}
    try:
        check_same_run(provenance["configuration"], run.config)
    except BadConfig:
        return []
    return rows if made == {"attn": ranking.attn, "act": ranking.act} else []


def _checked_ranking(run: Run) -> Ranking:
    for name, verb in (("dense/dense.json", "dense"), ("costs.parquet", "profile")):
        if not run.store.exists(name):
            raise BadRun(f"no {name} in {run.store.location!r} yet: run `dpt-search {verb}` on it first")
    if run.start_weights and not run.store.exists("probe/model.safetensors"):
        raise BadRun(f"no probe in {run.store.location!r} yet to start from: run `dpt-search probe` on it first")
    return read_ranking(run)


class Records:
    """The trials of `table/`, and of a table that is there, that were made from the same inputs."""

    def __init__(
        self, store: RunStore, inputs: str, start: str = "dense", known: Sequence[dict[str, Any]] = ()
    ) -> None:
        self._store, self._inputs, self._start = store, inputs, start
        self._known = {(row["n_attn"], row["n_act"], row["seed"]): row for row in known}

    def read(self, job: Job) -> dict[str, Any] | None:
        """Return a trial's record; None when there is none of these inputs, or it is broken."""
        known = self._known.get((job.cell.n_attn, job.cell.n_act, job.seed))
        if known is not None:
            return known
        try:
            found: dict[str, Any] | None = self._store.read_json(f"{FOLDER}/{job.record}")
        except BadRun:
            return None
        return found if found is not None and found.get("inputs") == self._inputs else None

    def has(self, job: Job) -> bool:
        """Say whether a trial need not be run."""
        return self.read(job) is not None

    def write(self, job: Job, plan: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write a trial's record whole, and return it; a trial that failed has no accuracy."""
        error = result["error"]
        record = {
            "n_attn": job.cell.n_attn, "n_act": job.cell.n_act, "plan": plan, "seed": job.seed, "start": self._start,
            "trial_seed": job.trial_seed, "status": "failed" if error else "finished", "error": error,
            "removed_accuracy": result.get("removed_accuracy"), "accuracies": result.get("accuracies", []),
            "accuracy": None if error else result["accuracies"][-1], "cost": result.get("cost", 0.0),
            "seconds": result.get("seconds", 0.0), "device": result.get("device", ""),
            "versions": result.get("versions", {}), "images": result.get("images", {}), "inputs": self._inputs,
            "time": time.time(),
        }  # fmt: skip
        self._store.write_json(f"{FOLDER}/{job.record}", record)
        return record


def _run_missing(run: Run, ranking: Ranking, missing: list[Job], records: Records, shard: tuple[int, int]) -> None:
    """Run trials, `table/shard-I-of-N` being theirs alone: its lease keeps a second start of the shard out."""
    own = RunStore(run.store.path(f"{FOLDER}/shard-{shard[0]}-of-{shard[1]}"))
    with Lease(own):
        states = own.path("states")
        run.store.delete_dir(f"{FOLDER}/shard-{shard[0]}-of-{shard[1]}/states")
        task = TrialTask(**run.task(threads=1), recipe=run.config.trial, checkpoints=states, start=run.start_weights)
        plans = [str(ranking.plan(job.cell)) for job in missing]
        told = [(task, j.number, plan, j.trial_seed) for j, plan in zip(missing, plans, strict=True)]
        run.start_ray()
        lines = _Lines(run.say, len(missing), run.config.max_failures)
        each = resources(run.config, 1, run.config.devices_per_trial)
        for position, result in call_each(each, "trainables.table_trial:run_trial", told):
            job = missing[position]
            record = records.write(job, plans[position], result or {"error": "its worker was lost"})
            own.delete(f"states/{job.number:06d}.pt")
            lines.ended(job, record)
    run.store.delete_dir(f"{FOLDER}/shard-{shard[0]}-of-{shard[1]}")


class _Lines:
    """One line for every trial, with the time that is left."""

    def __init__(self, say: Callable[[str], None], total: int, max_failures: int) -> None:
        self._say, self._total, self._most = say, total, max_failures
        self._done, self._failures, self._start = 0, 0, time.monotonic()
        say(f"table: {total} trials to run")

    def ended(self, job: Job, record: dict[str, Any]) -> None:
        """Say how a trial ended; stop after too many failures in a row."""
        self._done += 1
        left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        failed = record["accuracy"] is None
        how = f"failed: {record['error']}" if failed else f"val {record['accuracy']:.1%}, {record['seconds']:.0f} s"
        self._say(f"{job.cell} seed {job.seed}: {how}; {self._done} of {self._total} done, {duration(left)} left")
        self._failures = self._failures + 1 if failed else 0
        if self._failures >= self._most:
            raise StageFailed(f"{self._failures} trials in a row failed; the last one: {record['error']}")


def _row(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in SCHEMA.names}


def _provenance(run: Run, ranking: Ranking, rows: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """Return what the table was made of and with, what is known of rows that it had before included."""
    config: RunConfig = run.config
    dense = run.store.read_json("dense/dense.json")
    before = read_rows(run.store.path(NAME))[1] if run.store.exists(NAME) else {}
    made = [row for row in rows if row.get("device")]
    images = made[0]["images"] if made else {k: v for k, v in before.get("images", {}).items() if k != "dense"}
    return {
        "configuration": asdict(config),
        "versions": {**versions(), **(made[0]["versions"] if made else before.get("versions", {}))},
        "commit": commit(),
        "command": " ".join(sys.argv),
        **asdict(request),
        "start": config.start,
        "ranking": {"attn": list(ranking.attn), "act": list(ranking.act)},
        "dense_accuracy": dense["accuracy"],
        "images": {**images, "dense": dense["images"]},
        "devices": _distinct([*(row["device"] for row in made), *before.get("devices", [])]),
        "failed": before.get("failed", {})
        | {f"({r['n_attn']},{r['n_act']}) seed {r['seed']}": r["error"] for r in rows if r.get("error")},
    }


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))
