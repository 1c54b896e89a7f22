"""costs.parquet: what the dense model costs and what each unit saves, one row each, as the profile measured it."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from dpt_search.parquet import first_line, from_bytes, to_bytes
from dpt_search.store import BadRun, RunStore
from search_spaces.costs import Cost, UnitCosts
from search_spaces.plan import Unit

NAME = "costs.parquet"
_SECONDS = "seconds_"
_SPREAD = "spread_"


def write_costs(store: RunStore, device: str, rows: list[dict[str, Any]]) -> None:
    """Write the profile's rows: kind (`dense` for the model as built), index, macs, params, seconds_B and spread_B."""
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"device": device})
    store.write(NAME, to_bytes(table))


def read_costs(store: RunStore) -> UnitCosts | None:
    """Return the costs of the run; None before the profile.

    Raises:
        BadRun: the file is there and cannot be read.
    """
    if not store.exists(NAME):
        return None
    try:
        table = from_bytes(store.read(NAME))
        rows = {(row["kind"], row["index"]): row for row in table.to_pylist()}
        dense = _cost(rows.pop(("dense", -1)))
        saved = {Unit(*key): _cost(row) for key, row in rows.items()}
    except (pa.ArrowException, KeyError) as error:
        raise BadRun(
            f"cannot read {store.path(NAME)} ({first_line(error)}): remove it to have it measured again"
        ) from None
    device = (table.schema.metadata or {}).get(b"device", b"").decode()
    return UnitCosts(dense, saved, device, {Unit(*key): _by_batch(row, _SPREAD) for key, row in rows.items()})


def _cost(row: dict[str, Any]) -> Cost:
    return Cost(row["macs"], row["params"], _by_batch(row, _SECONDS))


def _by_batch(row: dict[str, Any], prefix: str) -> dict[int, float]:
    return {int(name.removeprefix(prefix)): row[name] for name in row if name.startswith(prefix)}
