"""probe.parquet: what the elastic probe's shared weights say of each cell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpt_search.parquet import from_bytes, to_bytes
from dpt_search.store import BadRun, RunStore
from search_spaces import first_line
from search_spaces.ratios import Cell

NAME = "probe.parquet"
SCHEMA = pa.schema(
    {
        "n_attn": pa.int64(),
        "n_act": pa.int64(),
        "plan": pa.string(),
        "accuracy": pa.float64(),
        "loss": pa.float64(),
        "images": pa.int64(),
    }
)
"""Accuracies are fractions on the split `probe`, over so many images, and losses mean cross-entropies there in nats."""


@dataclass(frozen=True)
class ProbeTable:
    """What the probe found.

    Attributes:
        cells: the cells that were evaluated; the dense model's is always one of them.
        accuracies: of each with the shared weights, on the split `probe`; shape (cells,).
        losses: mean cross-entropies of the same, in nats; None where an earlier version made the table.
        epochs: of the shared weights' training.
        about: cost (images times MACs), seconds and so on, as plain data.
    """

    cells: list[Cell]
    accuracies: NDArray[np.float64]
    losses: NDArray[np.float64] | None
    epochs: int
    about: dict[str, Any]


def write_probe(store: RunStore, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the rows, with the columns of `SCHEMA`, and what they were made with."""
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({"probe": json.dumps(about)}))
    store.write(NAME, to_bytes(table))


def read_probe(store: RunStore) -> ProbeTable | None:
    """Return what the probe found; None where there was none.

    Raises:
        BadRun: the file is there and cannot be read.
    """
    if not store.exists(NAME):
        return None
    try:
        table = from_bytes(store.read(NAME))
        about = json.loads((table.schema.metadata or {})[b"probe"])
        epochs = int(about["epochs"])
        cells = [Cell(row["n_attn"], row["n_act"]) for row in table.to_pylist()]
        accuracies = table["accuracy"].to_numpy()
        known = "loss" in table.column_names and not table["loss"].null_count
        losses = table["loss"].to_numpy() if known else None
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise BadRun(
            f"cannot read {store.path(NAME)} ({first_line(error)}): remove it to have the probe made again"
        ) from None
    return ProbeTable(cells, accuracies, losses, epochs, about)
