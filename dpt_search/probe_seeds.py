"""probes.parquet: the elastic probe with several seeds, every cell evaluated, for replays of searches that have one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpt_search.parquet import from_bytes, to_bytes
from dpt_search.probe_stage import probe_task
from dpt_search.remote import call_each, resources
from dpt_search.run import Run, commit, digest_of, identity_of
from dpt_search.store import BadRun
from search_spaces import first_line
from search_spaces.ratios import Cell
from trainables.locations import read_bytes, write_bytes
from trainables.tasks import ProbeTask

NAME = "probes.parquet"
SCHEMA = pa.schema(
    {
        "n_attn": pa.int64(), "n_act": pa.int64(), "seed": pa.int64(), "accuracy": pa.float64(), "loss": pa.float64(),
        "images": pa.int64(), "cost": pa.float64(),
    }
)  # fmt: skip
"""Accuracies are fractions on the split `probe`, and losses mean cross-entropies there in nats; `cost` is that of one
evaluation, images times MACs."""


@dataclass(frozen=True)
class ProbeSeeds:
    """What the probe says with several seeds.

    Attributes:
        cells: the cells, in lexicographic order.
        accuracies: with the shared weights of each seed, shape (cells, seeds).
        losses: mean cross-entropies of the same, in nats; None where an earlier version made the table.
        costs: of one evaluation of each cell, images times MACs, shape (cells,).
        training_cost: of the shared weights of one seed, images times MACs.
        epochs: of their training.
    """

    cells: list[Cell]
    accuracies: NDArray[np.float64]
    losses: NDArray[np.float64] | None
    costs: NDArray[np.float64]
    training_cost: float
    epochs: int


def tabulate_probes(run: Run, seeds: int, cells: list[Cell]) -> str:
    """Run the probes that are missing, and write the table.

    Args:
        run: a run with a ranking, whose configuration has a probe.
        seeds: how many.
        cells: what each evaluates.

    Returns:
        Where the table is.
    """
    base = replace(probe_task(run), cells=tuple(sorted(cells)), threads=1)
    tasks = {
        seed: replace(base, seed=base.seed + seed, folder=run.store.path(f"table/probe-{seed}"))
        for seed in range(seeds)
    }
    missing = [seed for seed, task in tasks.items() if _record(run, seed, task) is None]
    if missing:
        run.start_ray()
        each = resources(run.config, 1, run.config.devices_per_trial)
        for position, found in call_each(each, "trainables.probe:run_probe", [(tasks[seed],) for seed in missing]):
            seed = missing[position]
            if found is not None:
                run.store.write_json(f"table/probe-{seed}.json", {**found, "inputs": _inputs(run, tasks[seed])})
                run.store.delete_dir(f"table/probe-{seed}")
            run.say(f"probe with seed {seed}: {'its worker was lost' if found is None else 'done'}")
    records = [record for seed, task in tasks.items() if (record := _record(run, seed, task)) is not None]
    place = run.store.path(NAME)
    _write(place, records, base)
    return place


def _inputs(run: Run, task: ProbeTask) -> str:
    told = {name: value for name, value in asdict(task).items() if name != "reseed"}
    return digest_of([identity_of(run.config), {**told, "folder": ""}])


def _record(run: Run, seed: int, task: ProbeTask) -> dict[str, Any] | None:
    found: dict[str, Any] | None = run.store.read_json(f"table/probe-{seed}.json")
    # An earlier version told no losses.
    valid = found is not None and found["inputs"] == _inputs(run, task) and "loss" in found["rows"][0]
    return found if valid else None


def _write(place: str, records: list[dict[str, Any]], task: ProbeTask) -> None:
    rows = [
        {name: row[name] for name in SCHEMA.names if name != "seed"} | {"seed": seed}
        for seed, record in enumerate(records)
        for row in record["rows"]
    ]
    about = {
        "training_cost": records[0]["training_cost"], "recipe": asdict(task.recipe), "draw": task.draw,
        "sandwich": task.sandwich, "commit": commit(), "command": " ".join(sys.argv),
        **{name: records[0][name] for name in ("images", "device", "versions")},
    }  # fmt: skip
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({"probes": json.dumps(about)}))
    write_bytes(place, to_bytes(table))


def read_probes(location: str) -> ProbeSeeds | None:
    """Read the table; None where there is none.

    Raises:
        BadRun: it is no such table.
    """
    try:
        table = from_bytes(read_bytes(location))
        about = json.loads((table.schema.metadata or {})[b"probes"])
        rows = table.to_pylist()
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise BadRun(f"cannot read the probes {location!r} ({type(error).__name__}: {first_line(error)})") from None
    cells = sorted({Cell(row["n_attn"], row["n_act"]) for row in rows})
    position = {cell: index for index, cell in enumerate(cells)}
    accuracies, costs = np.full((len(cells), 1 + max(row["seed"] for row in rows)), np.nan), np.zeros(len(cells))
    losses = np.full_like(accuracies, np.nan) if "loss" in table.column_names else None
    for row in rows:
        where = position[Cell(row["n_attn"], row["n_act"])]
        accuracies[where, row["seed"]], costs[where] = row["accuracy"], row["cost"]
        if losses is not None:
            losses[where, row["seed"]] = row["loss"]
    return ProbeSeeds(cells, accuracies, losses, costs, about["training_cost"], about["recipe"]["epochs"])
