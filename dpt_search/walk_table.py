"""walks.parquet: the published walks as recorded sequences, one row a trial, as `tabulate --walks` made them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dpt_search import surface_table
from dpt_search.parquet import from_bytes, to_bytes
from dpt_search.store import BadRun
from search_spaces import first_line
from search_spaces.ratios import Cell, RatioSpace
from trainables.locations import read_bytes, write_bytes

NAME = "walks.parquet"
SCHEMA = pa.schema(
    [
        *surface_table.SCHEMA,
        pa.field("walk", pa.string()),
        pa.field("step", pa.int64()),
        pa.field("trial", pa.string()),
        pa.field("start_trial", pa.string()),
        pa.field("chain_epochs", pa.int64()),
    ]
)
"""The columns of a table, and `start_trial`, whose weights a trial starts from: null for those that `start` names.
`chain_epochs` are those trained since then, the trial's own included. `seed` is which repetition of the walk."""


@dataclass(frozen=True)
class WalkTrial:
    """One recorded trial that finished.

    Attributes:
        trial: its name.
        start_trial: the trial whose weights it started from; None for the start of all walks.
        cell: what was removed.
        accuracy: of the last epoch, on val.
        cost: images times MACs.
    """

    trial: str
    start_trial: str | None
    cell: Cell
    accuracy: float
    cost: float


def write_walks(location: str, space: RatioSpace, rows: Sequence[dict[str, Any]], provenance: dict[str, Any]) -> None:
    """Write the rows, with the columns of `SCHEMA`, whole; provenance goes into the file's metadata.

    Raises:
        OSError: the place cannot be written to.
    """
    told = json.dumps({**provenance, "space": [space.n_attn, space.n_act]})
    write_bytes(location, to_bytes(pa.Table.from_pylist(list(rows), SCHEMA.with_metadata({"provenance": told}))))


def read_walks(location: str) -> list[list[WalkTrial]]:
    """Return the recorded walks, by seed: all trials that finished, in the order of the published samples.

    Returns:
        No seed where there is no such file.

    Raises:
        BadRun: the file is no such table.
    """
    try:
        rows = from_bytes(read_bytes(location)).select(SCHEMA.names).to_pylist()
    except FileNotFoundError:
        return []
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise BadRun(f"cannot read the walks {location!r} ({type(error).__name__}: {first_line(error)})") from None
    found: dict[int, list[WalkTrial]] = {}
    for row in rows:
        if row["accuracy"] is not None:
            cell = Cell(row["n_attn"], row["n_act"])
            each = WalkTrial(row["trial"], row["start_trial"], cell, row["accuracy"], row["cost"])
            found.setdefault(row["seed"], []).append(each)
    return [found[seed] for seed in sorted(found)]
