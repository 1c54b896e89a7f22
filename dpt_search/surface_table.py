"""table.parquet: the measured surface of a run, one row a trial, as `tabulate` made it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpt_search.parquet import from_bytes, to_bytes
from dpt_search.store import BadRun
from search_spaces import first_line
from search_spaces.ratios import Cell, RatioSpace
from trainables.locations import is_dir, read_bytes, write_bytes

NAME = "table.parquet"
SCHEMA = pa.schema(
    {
        "n_attn": pa.int64(),
        "n_act": pa.int64(),
        "plan": pa.string(),
        "seed": pa.int64(),
        "removed_accuracy": pa.float64(),
        "accuracies": pa.list_(pa.float64()),
        "accuracy": pa.float64(),
        "cost": pa.float64(),
        "seconds": pa.float64(),
        "start": pa.string(),
    }
)
"""Accuracies are fractions on val; `accuracy` is that of the last epoch, null where the trial failed. `cost` is images
times MACs."""


@dataclass(frozen=True)
class SurfaceTable:
    """A measured surface.

    Attributes:
        space: the lattice the cells are of.
        cells: the cells of the table, in lexicographic order.
        accuracies: accuracy of the last epoch on val, shape (cells, seeds); nan where there is none.
        costs: cost of one trial (images times MACs), mean over its seeds, shape (cells,); nan where there is none.
        provenance: what the table was made of and with, as plain data.
    """

    space: RatioSpace
    cells: list[Cell]
    accuracies: NDArray[np.float64]
    costs: NDArray[np.float64]
    provenance: dict[str, Any]

    @property
    def dense(self) -> float | None:
        """Accuracy of the dense model on val; None where the table does not say, or its trials do not start from it."""
        if self.provenance.get("start", "dense") != "dense":
            return None
        found: float | None = self.provenance.get("dense_accuracy")
        return found

    @property
    def trial_epochs(self) -> int | None:
        """Epochs of one trial; None where the table does not say."""
        found: int | None = (self.provenance.get("configuration") or {}).get("trial", {}).get("epochs")
        return found


def write_table(location: str, space: RatioSpace, rows: Sequence[dict[str, Any]], provenance: dict[str, Any]) -> None:
    """Write a table whole.

    Args:
        location: where the file goes: a path or URI.
        space: the lattice the cells are of.
        rows: one a trial, with the columns of `SCHEMA`.
        provenance: plain data that goes into the file's metadata.

    Raises:
        OSError: the place cannot be written to.
    """
    told = json.dumps({**provenance, "space": [space.n_attn, space.n_act]})
    table = pa.Table.from_pylist(list(rows), SCHEMA.with_metadata({"provenance": told}))
    write_bytes(location, to_bytes(table))


def read_table(location: str) -> SurfaceTable:
    """Read a table.

    Args:
        location: the file, or the run directory that has it: a path or URI.

    Raises:
        BadRun: it is not there, or is no table.
    """
    rows, provenance = read_rows(location)
    return _table(RatioSpace(*provenance["space"]), rows, provenance)


def read_rows(location: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read a table's rows, with the columns of `SCHEMA`, and its provenance.

    Args:
        location: the file, or the run directory that has it: a path or URI.

    Raises:
        BadRun: it is not there, or is no table.
    """
    try:
        place = f"{location.rstrip('/')}/{NAME}" if is_dir(location) else location
        table = from_bytes(read_bytes(place))
        provenance = json.loads((table.schema.metadata or {})[b"provenance"])
        RatioSpace(*provenance["space"])
        return table.select(SCHEMA.names).to_pylist(), provenance
    except FileNotFoundError:
        raise BadRun(f"no table at {location!r}: `dpt-search tabulate RUN` makes one") from None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise BadRun(f"cannot read the table {location!r} ({type(error).__name__}: {first_line(error)})") from None


def _table(space: RatioSpace, rows: list[dict[str, Any]], provenance: dict[str, Any]) -> SurfaceTable:
    cells = sorted({Cell(row["n_attn"], row["n_act"]) for row in rows})
    shape = len(cells), 1 + max((row["seed"] for row in rows), default=-1)
    accuracies, costs = np.full(shape, np.nan), np.full(shape, np.nan)
    position = {cell: index for index, cell in enumerate(cells)}
    for row in rows:
        if row["accuracy"] is not None:
            place = position[Cell(row["n_attn"], row["n_act"])], row["seed"]
            accuracies[place], costs[place] = row["accuracy"], row["cost"]
    known = np.isfinite(costs)
    sums, counts = np.where(known, costs, 0.0).sum(axis=1), known.sum(axis=1)
    means = np.divide(sums, counts, out=np.full(len(cells), np.nan), where=counts > 0)
    return SurfaceTable(space, cells, accuracies, means, provenance)
