"""`tabulate`: a table of a run's real surface, every cell tried with several seeds.

Every trial is one immutable file of `table/`, so that a start, of whatever shard, repeats none that is there. The
trials run as those of the search do, without its sampler.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from dpt_search.config import BadConfig, RunConfig, check_same_run
from dpt_search.run import Run, commit, versions
from dpt_search.surface_table import NAME, SCHEMA, read_rows, write_table
from dpt_search.table_records import Job, Records, checked_ranking, inputs_of, run_missing
from search_spaces import BadInput
from search_spaces.plan import Ranking
from search_spaces.ratios import Cell, RatioSpace, spread


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


def job_of(space: RatioSpace, cell: Cell, seed: int) -> Job:
    """Return a trial of the table."""
    return Job(cell, seed, seed * len(space) + list(space).index(cell))


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
    ranking = checked_ranking(run)
    records = records_of(run, ranking)
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
        run_missing(run, ranking, missing, records, shard)
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


def records_of(run: Run, ranking: Ranking) -> Records:
    """Return the trials of the run's table, in files of their own or in the table itself."""
    return Records(run.store, inputs_of(run, ranking), run.config.start, known_rows(run, ranking))


def known_rows(run: Run, ranking: Ranking) -> list[dict[str, Any]]:
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
