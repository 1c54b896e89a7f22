"""The file of a measured surface."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpt_search.store import BadRun
from dpt_search.surface_table import SCHEMA, read_table, write_table
from search_spaces.ratios import Cell, RatioSpace

SPACE = RatioSpace(2, 3)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRun, match="no table at"):
        read_table(str(tmp_path))
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadRun, match="cannot read the table"):
        read_table(str(tmp_path / "table.parquet"))
    pq.write_table(SCHEMA.empty_table(), tmp_path / "other.parquet")
    with pytest.raises(BadRun, match="cannot read the table"):
        read_table(str(tmp_path / "other.parquet"))


def test_what_is_missing_is_nan(tmp_path: Path) -> None:
    place = str(tmp_path / "partial.parquet")
    row = {"plan": "x", "removed_accuracy": 0.1, "accuracies": [0.5], "seconds": 1.0, "start": "dense"}
    rows = [
        {**row, "n_attn": 1, "n_act": 0, "seed": 1, "accuracy": 0.5, "cost": 4.0},
        {**row, "n_attn": 0, "n_act": 1, "seed": 0, "accuracy": None, "cost": 9.0},
    ]
    write_table(place, SPACE, rows, {"command": "mine"})
    table = read_table(place)
    assert table.cells == [Cell(0, 1), Cell(1, 0)]
    assert np.array_equal(table.accuracies, [[np.nan, np.nan], [np.nan, 0.5]], equal_nan=True)
    assert np.array_equal(table.costs, [np.nan, 4.0], equal_nan=True)
    assert table.provenance["command"] == "mine"
