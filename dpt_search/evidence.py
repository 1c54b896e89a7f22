"""What a run directory holds, finished or not, and what a reader must know before believing it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpt_search.costs_table import read_costs, read_warnings
from dpt_search.decisions import cell_costs
from dpt_search.observed import ended, surface_trials
from dpt_search.store import BadRun, Finished, RunStore, TrialLog
from search_spaces.budgets import parse_budgets
from search_spaces.costs import UnitCosts
from search_spaces.goals import CellCosts
from search_spaces.plan import Ranking


@dataclass(frozen=True)
class Found:
    """What a run directory holds; None, or empty, where a stage has not been done."""

    location: str
    run: dict[str, Any]
    dense: dict[str, Any] | None
    costs: UnitCosts | None
    ranking: dict[str, Any] | None
    log: TrialLog
    recommendation: dict[str, Any] | None
    finetune: dict[str, Any] | None
    baseline: dict[str, Any] | None
    export: dict[str, Any] | None
    cell_costs: CellCosts | None
    unsure_costs: list[str]
    stages: list[dict[str, Any]]

    @property
    def finished(self) -> list[Finished]:
        """The trials that tell of the surface and came to an accuracy, by number."""
        told = ended(self.log)
        if self.ranking is not None:
            told = surface_trials(self.log, Ranking(tuple(self.ranking["attn"]), tuple(self.ranking["act"])))
        return [each for each in told if each.accuracy is not None]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The recommendations, one a budget."""
        rows: list[dict[str, Any]] = self.recommendation["budgets"] if self.recommendation else []
        return rows

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The recommendation of the budget that is, or was, fine-tuned."""
        config, done = self.run["config"], self.export or self.finetune
        wanted = done["budget"] if done else config["finetune_budget"]
        # As it is written there, whatever was typed.
        wanted = str(parse_budgets(wanted)[0]) if wanted else ""
        # Unless another is named, the last is.
        return next((row for row in self.rows[::-1] if row["budget"] == wanted or not wanted), None)

    @property
    def plan(self) -> str | None:
        """The plan that is furthest on its way: exported, fine-tuned or recommended."""
        done = self.export or self.finetune or self.chosen
        return done["plan"] if done else None


def read_run(store: RunStore) -> Found:
    """Read whatever a run directory holds.

    Raises:
        BadRun: it is no run directory, or one of its files cannot be read.
    """
    run = store.read_json("run.json")
    if run is None:
        raise BadRun(f"{store.location!r} is no run directory: it has no run.json")
    stamps = [store.read_json(f"stages/{name}") for name in store.names("stages")]
    return Found(
        location=store.location,
        run=run,
        dense=store.read_json("dense/dense.json"),
        costs=read_costs(store),
        ranking=store.read_json("ranking.json"),
        log=TrialLog(store),
        recommendation=store.read_json("recommendation.json"),
        finetune=store.read_json("finetune/finetune.json"),
        baseline=store.read_json("baseline/baseline.json"),
        export=store.read_json("export/summary.json"),
        cell_costs=cell_costs(store),
        unsure_costs=read_warnings(store),
        stages=sorted(stamps, key=lambda stamp: stamp["finished_at"]),
    )


def warnings(found: Found) -> list[str]:
    """Return what a reader must know before believing the numbers."""
    lines = [*(found.dense["warnings"] if found.dense else []), *found.unsure_costs]
    failed = sum(record.status == "failed" for record in found.log.finished.values())
    if failed:
        lines.append(f"{failed} of {len(found.log.finished)} trials failed; the table of trials says why")
    lines += [f"a record of the trial log cannot be read and was skipped: {name}" for name in found.log.broken]
    if found.recommendation and found.recommendation["observations"] != len(found.finished):
        seen, now = found.recommendation["observations"], len(found.finished)
        lines.append(f"the recommendations are from {seen} observations and there are {now} now: recommend again")
    lines += _stale(found)
    for batch, timing in (found.export or {"timing": {}})["timing"].items():
        if timing["low"] <= 1:
            ends = f"{timing['low']:.2f}x to {timing['high']:.2f}x"
            lines.append(f"at batch {batch} the speedup cannot be told from none ({ends})")
    told = (found.export or {}).get("verdict")
    if told is not None and not told["met"]:
        lines.append(told["text"])
    if found.export and "baseline" not in found.export and found.export["difference"]["low"] > 0:
        lines.append(
            "the merged model had a fine-tune that the dense model had not: some of its gain is not pruning's; "
            "--baseline gives the dense model the same"
        )
    return lines


def _stale(found: Found) -> Iterator[str]:
    """Say where later stages are about another plan than earlier ones."""
    recommended = {row["budget"]: row["plan"] for row in found.rows}
    if recommended and found.finetune and recommended.get(found.finetune["budget"], "") != found.finetune["plan"]:
        yield f"what was fine-tuned, {found.finetune['plan']}, is not what is recommended now for its budget"
    if found.finetune and found.export and found.finetune["plan"] != found.export["plan"]:
        yield f"what was exported, {found.export['plan']}, is not what was fine-tuned last"
    if found.baseline and found.export and "baseline" not in found.export:
        yield "the dense model was given the same fine-tune, but the export was made without it: export again"
