"""costs.parquet: what the dense model costs and what each unit saves, one row each, as the profile measured it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from dpt_search.parquet import from_bytes, to_bytes
from dpt_search.store import BadRun, RunStore
from search_spaces import first_line
from search_spaces.costs import Cost, UnitCosts
from search_spaces.plan import Unit

NAME = "costs.parquet"
_SECONDS = "seconds_"
_SPREAD = "spread_"


def write_costs(
    store: RunStore, device: str, rows: list[dict[str, Any]], about: Mapping[str, Any] | None = None
) -> None:
    """Write the profile.

    Args:
        store: the run directory.
        device: name of the hardware.
        rows: kind (`dense` for the model as built), index, macs, params, seconds_B and spread_B.
        about: how seconds were measured: `compiled`, `dtype`, `threads`, `rounds`, `warnings`, ...
    """
    told = {"device": device, "about": json.dumps(dict(about or {}))}
    store.write(NAME, to_bytes(pa.Table.from_pylist(rows).replace_schema_metadata(told)))


def read_costs(store: RunStore) -> UnitCosts | None:
    """Return the costs of the run; None before the profile.

    Raises:
        BadRun: the file is there and cannot be read.
    """
    if not store.exists(NAME):
        return None
    try:
        table = from_bytes(store.read(NAME))
        about = _metadata(table)
        return costs_of(about["device"], table.to_pylist(), about.get("compiled", False))
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise BadRun(
            f"cannot read {store.path(NAME)} ({first_line(error)}): remove it to have it measured again"
        ) from None


def read_warnings(store: RunStore) -> list[str]:
    """Return what the profile could not measure well enough; nothing where it could, or where there is none yet."""
    if not store.exists(NAME):
        return []
    found: list[str] = _metadata(from_bytes(store.read(NAME))).get("warnings", [])
    return found


def costs_of(device: str, rows: list[dict[str, Any]], compiled: bool) -> UnitCosts:
    """Return the costs that a profile's rows tell; see `write_costs`.

    Raises:
        KeyError: a row or a field is missing.
    """
    by_unit = {(row["kind"], row["index"]): row for row in rows}
    dense = _cost(by_unit.pop(("dense", -1)))
    saved = {Unit(*key): _cost(row) for key, row in by_unit.items()}
    spreads = {Unit(*key): _by_batch(row, _SPREAD) for key, row in by_unit.items()}
    return UnitCosts(dense, saved, device, spreads, compiled)


def told(costs: UnitCosts) -> list[str]:
    """Return a line on the dense model, and one per batch size on what units of one kind and shape save."""
    models = "models compiled" if costs.compiled else "models as they are, not compiled"
    lines = [
        f"dense model: {costs.dense.macs / 1e6:.4g} M MACs, {costs.dense.params / 1e6:.3g} M parameters; timed on "
        f"{costs.device}, {models}"
    ]
    for batch, whole in costs.dense.seconds.items():
        alike = Counter(
            (unit.kind, cost.seconds[batch], costs.spreads[unit][batch]) for unit, cost in costs.saved.items()
        )
        each = [
            f"{'each of ' if count > 1 else ''}{count} {kind} {saved / whole:.2%} ± {spread / whole:.2%}"
            for (kind, saved, spread), count in alike.items()
        ]
        lines.append(f"batch {batch}: dense {1000 * whole:.4g} ms; of that, removing saves: {', '.join(each)}")
    return lines


def _metadata(table: pa.Table) -> dict[str, Any]:
    metadata = table.schema.metadata or {}
    about = json.loads(metadata.get(b"about", b"{}"))
    return {**about, "device": metadata.get(b"device", b"").decode()}


def _cost(row: dict[str, Any]) -> Cost:
    return Cost(row["macs"], row["params"], _by_batch(row, _SECONDS))


def _by_batch(row: dict[str, Any], prefix: str) -> dict[int, float]:
    return {int(name.removeprefix(prefix)): row[name] for name in row if name.startswith(prefix)}
