"""The probe with several seeds: what is run, what is kept, and the table of it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpt_search import probe_seeds
from dpt_search.compare import Judge
from dpt_search.probe_seeds import ProbeSeeds, read_probes, tabulate_probes
from dpt_search.run import Run
from dpt_search.store import BadRun
from dpt_search.surface_table import SurfaceTable
from search_spaces.goals import unit_goals
from search_spaces.ratios import Cell, RatioSpace
from trainables.probe import run_probe
from trainables.tasks import ProbeTask

CELLS = [Cell(0, 0), Cell(1, 1), Cell(0, 4), Cell(3, 2)]


@pytest.fixture
def probed(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> list[ProbeTask]:
    """Probes run in this process; returns what they were told."""
    tasks: list[ProbeTask] = []

    def call_each(_: Any, target: str, told: Sequence[tuple[ProbeTask]]) -> Iterator[tuple[int, dict[str, Any]]]:
        assert target == "trainables.probe:run_probe"
        for position, (task,) in enumerate(told):
            tasks.append(task)
            yield position, run_probe(task)

    monkeypatch.setattr(probe_seeds, "call_each", call_each)
    monkeypatch.setattr(Run, "start_ray", lambda self: None)
    return tasks


def test_every_seed_is_a_column_and_none_is_run_twice(tiny_run: Run, probed: list[ProbeTask]) -> None:
    place = tabulate_probes(tiny_run, 2, CELLS)
    first = read_probes(place)
    assert first is not None
    assert first.losses is not None
    assert first.cells == sorted(CELLS)
    assert first.accuracies.shape == first.losses.shape == (4, 2)
    assert len({task.seed for task in probed}) == 2
    assert not np.array_equal(first.losses[:, 0], first.losses[:, 1])
    assert (first.costs[1:] < first.costs[0]).all()
    assert first.epochs == 1
    again = read_probes(tabulate_probes(tiny_run, 3, CELLS))
    assert len(probed) == 3
    assert again is not None
    assert again.losses is not None
    assert np.array_equal(again.losses[:, :2], first.losses)


def test_a_record_that_is_not_of_this_probe_is_made_again(tiny_run: Run, probed: list[ProbeTask]) -> None:
    tabulate_probes(tiny_run, 2, CELLS)
    record = Path(tiny_run.config.run_dir, "table", "probe-1.json")
    found = json.loads(record.read_text())
    # As an earlier version wrote them.
    record.write_text(
        json.dumps({**found, "rows": [{k: v for k, v in r.items() if k != "loss"} for r in found["rows"]]})
    )
    tabulate_probes(tiny_run, 2, CELLS)
    assert [task.seed for task in probed[2:]] == [probed[1].seed]
    tiny_run.config = replace(tiny_run.config, probe_lr=0.1)
    tabulate_probes(tiny_run, 2, CELLS)
    assert len(probed) == 5


def test_a_table_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    assert read_probes(str(tmp_path / "none.parquet")) is None
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(BadRun, match="cannot read the probes"):
        read_probes(str(tmp_path / "broken.parquet"))


def test_a_table_of_an_earlier_version_has_no_losses(tiny_run: Run, probed: list[ProbeTask], tmp_path: Path) -> None:
    table = pq.read_table(tabulate_probes(tiny_run, 2, CELLS))
    pq.write_table(table.drop_columns("loss"), tmp_path / "earlier.parquet")
    found = read_probes(str(tmp_path / "earlier.parquet"))
    assert found is not None
    assert found.losses is None
    assert found.accuracies.shape == (4, 2)


@pytest.mark.parametrize(("trial", "length"), [({"epochs": 4}, 0.5), ({"epochs": 1}, 2.0), ({}, 1.0)])
def test_in_a_replay_it_is_as_long_as_its_epochs_are_in_trials(trial: dict[str, int], length: float) -> None:
    space, provenance = RatioSpace(2, 2), {"configuration": {"trial": trial}}
    values = np.ones((len(space), 2))
    table = SurfaceTable(space, list(space), values, np.ones(len(space)), provenance)
    probe = Judge(
        table, unit_goals(space, 2), 0, ProbeSeeds(list(space), values, None, values[:, 0], 1.0, epochs=2)
    ).probe
    assert probe is not None and probe.length == length
