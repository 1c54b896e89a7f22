"""Trials outside a search, one immutable file each: those of a run's table, and those of its recorded walks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from dpt_search.lease import Lease
from dpt_search.progress import duration
from dpt_search.remote import StageFailed, call_each, resources
from dpt_search.run import Run, digest_of, identity_of, read_ranking
from dpt_search.store import BadRun, RunStore
from search_spaces.plan import Ranking
from search_spaces.ratios import Cell

FOLDER = "table"
SEED_STEP = 1000
"""Apart are the seeds of two trials: an epoch's order is seeded by the trial's seed plus the epoch."""


class Recorded(Protocol):
    """A trial with a record of its own."""

    @property
    def cell(self) -> Cell:
        """What is removed."""

    @property
    def seed(self) -> int:
        """Which repetition of its cell, or of its walk."""

    @property
    def record(self) -> str:
        """Name of the trial's file."""

    @property
    def trial_seed(self) -> int:
        """The seed the trial trains with: no two trials share one, so that their noise is independent."""


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
        """The seed the trial trains with."""
        return SEED_STEP * (1 + self.number)


def checked_ranking(run: Run) -> Ranking:
    """Return the ranking of a run that has all that trials need.

    Raises:
        BadRun: something is missing; the message says which verb makes it.
    """
    for name, verb in (("dense/dense.json", "dense"), ("costs.parquet", "profile")):
        if not run.store.exists(name):
            raise BadRun(f"no {name} in {run.store.location!r} yet: run `dpt-search {verb}` on it first")
    if run.start_weights and not run.store.exists("probe/model.safetensors"):
        raise BadRun(f"no probe in {run.store.location!r} yet to start from: run `dpt-search probe` on it first")
    return read_ranking(run)


def inputs_of(run: Run, ranking: Ranking) -> str:
    """Return the digest of what all trials depend on."""
    return digest_of([identity_of(run.config), asdict(ranking)])


class Records:
    """The trials of a folder, and others that are known, that were made from the same inputs."""

    def __init__(
        self,
        store: RunStore,
        inputs: str,
        start: str = "dense",
        known: Sequence[dict[str, Any]] = (),
        folder: str = FOLDER,
    ) -> None:
        """
        Args:
            store: the run directory.
            inputs: digest of what all trials depend on.
            start: name of the weights that they start from.
            known: rows of a table that is there, which need no record.
            folder: of the records.
        """
        self._store, self._inputs, self._start, self._folder = store, inputs, start, folder
        self._known = {(row["n_attn"], row["n_act"], row["seed"]): row for row in known}

    def read(self, job: Recorded) -> dict[str, Any] | None:
        """Return a trial's record; None when there is none of these inputs, or it is broken."""
        known = self._known.get((job.cell.n_attn, job.cell.n_act, job.seed))
        if known is not None:
            return known
        try:
            found: dict[str, Any] | None = self._store.read_json(f"{self._folder}/{job.record}")
        except BadRun:
            return None
        return found if found is not None and found.get("inputs") == self._inputs else None

    def has(self, job: Recorded) -> bool:
        """Say whether a trial need not be run."""
        return self.read(job) is not None

    def write(
        self, job: Recorded, plan: str, result: dict[str, Any], more: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write a trial's record whole, and what more is told of it, and return it; one that failed has no accuracy."""
        error = result["error"]
        record = {
            "n_attn": job.cell.n_attn, "n_act": job.cell.n_act, "plan": plan, "seed": job.seed, "start": self._start,
            "trial_seed": job.trial_seed, "status": "failed" if error else "finished", "error": error,
            "removed_accuracy": result.get("removed_accuracy"), "accuracies": result.get("accuracies", []),
            "accuracy": None if error else result["accuracies"][-1], "cost": result.get("cost", 0.0),
            "seconds": result.get("seconds", 0.0), "device": result.get("device", ""),
            "versions": result.get("versions", {}), "images": result.get("images", {}), "inputs": self._inputs,
            "time": time.time(), **(more or {}),
        }  # fmt: skip
        self._store.write_json(f"{self._folder}/{job.record}", record)
        return record


def run_missing(
    run: Run, ranking: Ranking, missing: Sequence[Job], records: Records, shard: tuple[int, int] = (0, 1)
) -> None:
    """Run trials, `table/shard-I-of-N/` being theirs alone: its lease keeps a second start of the shard out.

    Raises:
        BadRun: the shard runs already.
        StageFailed: too many trials in a row failed.
    """
    folder = f"{FOLDER}/shard-{shard[0]}-of-{shard[1]}"
    own = RunStore(run.store.path(folder))
    with Lease(own):
        own.delete_dir("states")
        task = run.trial_task(1, f"{folder}/states")
        plans = [str(ranking.plan(job.cell)) for job in missing]
        told = [(task, j.number, plan, j.trial_seed) for j, plan in zip(missing, plans, strict=True)]
        run.start_ray()
        lines = Lines(run.say, "table", len(missing), run.config.max_failures)
        each = resources(run.config, 1, run.config.devices_per_trial)
        for position, result in call_each(each, "trainables.table_trial:run_trial", told):
            job = missing[position]
            record = records.write(job, plans[position], result or {"error": "its worker was lost"})
            own.delete(f"states/{job.number:06d}.pt")
            lines.ended(job, record)
    run.store.delete_dir(folder)


class Lines:
    """One line for every trial, with the time that is left."""

    def __init__(self, say: Callable[[str], None], what: str, total: int, max_failures: int) -> None:
        self._say, self._total, self._most = say, total, max_failures
        self._done, self._failures, self._start = 0, 0, time.monotonic()
        say(f"{what}: {total} trials to run")

    def ended(self, job: Recorded, record: dict[str, Any]) -> None:
        """Say how a trial ended; stop after too many failures in a row."""
        self._done += 1
        left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        failed = record["accuracy"] is None
        how = f"failed: {record['error']}" if failed else f"val {record['accuracy']:.1%}, {record['seconds']:.0f} s"
        self._say(f"{job.cell} seed {job.seed}: {how}; {self._done} of {self._total} done, {duration(left)} left")
        self._failures = self._failures + 1 if failed else 0
        if self._failures >= self._most:
            raise StageFailed(f"{self._failures} trials in a row failed; the last one: {record['error']}")
