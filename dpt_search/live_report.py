"""`compare --live` as a whole: searches to the same cost, what their decisions are worth, and what to show of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpt_search.compare import POINT, Judge, Trace
from dpt_search.compare_report import comparison_table, csv_of, write_curves, write_page
from dpt_search.config import BadConfig
from dpt_search.curves import Curve, mean_curve
from dpt_search.decisions import goals_of
from dpt_search.live import SAMPLERS, Decisions, Search, decided, opened
from dpt_search.observed import ended
from dpt_search.probe_stage import prices_of
from dpt_search.remote import StageFailed
from dpt_search.run import Run
from dpt_search.store import BadRun, RunStore, TrialLog
from dpt_search.summary import text_table
from dpt_search.surface_table import NAME, SurfaceTable, read_table
from dpt_search.table_records import checked_ranking, run_missing
from dpt_search.tabulate import job_of, known_rows, records_of
from search_spaces.budgets import parse_budgets
from search_spaces.goals import Goal
from search_spaces.plan import Ranking
from search_spaces.ratios import Cell
from trainables.locations import write_bytes

_ABOUT = (
    "Every sampler searched on Ray as a run does, several times with seeds of its own, until probe and trials had the "
    "same cost. One unit of cost is a trial of the dense model; a probe's training and evaluation count from the "
    "start. Regret is the accuracy lost by what would be chosen at that cost. Intervals are 95 % over the searches of "
    "a sampler. "
)
_BY_TABLE = (
    "Decisions are judged by the run's table, whose trials no search has seen: each search by the mean of all seeds "
    "but one in turn. The noise floor is the regret of choosing by the seed that was left out, and is taken off."
)
_BY_TRIALS = (
    "The run has no table, so the cells that were chosen at the end were judged by trials of their own with new "
    "seeds, shared between samplers that chose the same cell. Regret is against the best of the judged cells that "
    "a budget is decided among, which need not be the best there is, and no noise floor is known: none is taken off."
)


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        names: keys of `SAMPLERS`.
        budget: text form; empty for the run's own.
        seeds: searches of every sampler.
        max_cost: of every search, in trials of the dense model.
        judge_seeds: trials that judge a cell where the run has no table.
        probe_epochs: of the probe; None for the run's own.
        workers: trials at a time; 0 for the run's own.
        out: folder of the searches and of what is shown; empty for `live` in the run directory.
    """

    names: Sequence[str]
    budget: str = ""
    seeds: int = 2
    max_cost: float = 20.0
    judge_seeds: int = 2
    probe_epochs: int | None = None
    workers: int = 0
    out: str = ""

    def check(self) -> None:
        """Refuse what cannot be compared.

        Raises:
            BadConfig: a sampler is unknown or a number makes no sense.
        """
        unknown = sorted(set(self.names) - set(SAMPLERS))
        if unknown:
            raise BadConfig(f"no sampler {unknown[0]!r} to compare live: use some of {', '.join(SAMPLERS)}")
        if min(self.seeds, self.judge_seeds) < 1 or not self.max_cost > 0:
            raise BadConfig("--seeds and --judge-seeds must be at least 1, and --max-cost more than 0")

    def told(self, run: Run) -> dict[str, Any]:
        """Return the fields of the configuration that differ from the run's."""
        changed: dict[str, Any] = {"budget": self.budget or run.config.budget}
        changed |= {} if self.probe_epochs is None else {"probe_epochs": self.probe_epochs}
        return changed | ({"max_concurrent": self.workers} if self.workers else {})


def run_live(run: Run, request: Request) -> Iterator[str]:
    """Search with every sampler, judge, and yield what to print. What is finished is not run again.

    Raises:
        BadConfig: the request makes no sense.
        BadRun: the run lacks its dense model, profile or ranking, or a directory has a search with other settings.
        StageFailed: too many trials in a row failed.
    """
    request.check()
    ranking = checked_ranking(run)
    budgets = _budgets(request, run)
    out = RunStore(request.out or run.store.path("live"))
    table = own_table(run, ranking)
    prices = prices_of(run)
    if prices is None:
        raise BadRun(f"dense.json of {run.store.location!r} is of an earlier version: begin another run")
    searches = [
        opened(run, out, name, number, prices, request.told(run))
        for number in range(request.seeds)
        for name in request.names
    ]
    _check_cost(searches, request.max_cost)
    for each in searches:
        each.go_on(request.max_cost)
    made = [(each, decided(each, budgets, request.max_cost)) for each in searches]
    if table is not None:
        traces = [_judged_by_table(table, budgets, each, found) for each, found in made]
        floor = float(np.mean([trace.floor.mean() for trace in traces]))
        judged = f"judged by the table's {table.accuracies.shape[1]} seeds; noise floor {floor / POINT:.2f} points"
    else:
        tried = judged_cells(run, ranking, _chosen(made, request.max_cost), request.judge_seeds)
        means = {cell: float(np.mean(accuracies)) for cell, accuracies in tried.items()}
        traces = [judged_by_trials(means, budgets, found, request.max_cost) for _, found in made]
        judged = (
            f"judged by {request.judge_seeds} trials each of the {len(means)} cells chosen at the end{_noise(tried)}"
        )
    together = ", ".join(map(str, budgets))
    title = f"{run.store.location}: live, cost {request.max_cost:g}, {request.seeds} seeds; {together}; {judged}"
    curves = _curves(request, searches, traces, whole=table is not None)
    shown = f"{comparison_table(curves)}\n\n{decision_table(made, budgets, request.max_cost)}"
    yield f"{title}\n\n{shown}\n"
    yield f"page: {_write(out, curves, title, shown, whole=table is not None)}"


def _check_cost(searches: Sequence[Search], max_cost: float) -> None:
    least = max(1 + each.upfront / each.prices.unit for each in searches)
    if max_cost < least:
        raise BadConfig(
            f"--max-cost {max_cost:g} is less than the probe and one trial of the dense model cost ({least:.2f}): "
            "allow more, or leave the probe out with --probe-epochs 0"
        )


def _budgets(request: Request, run: Run) -> tuple[Goal, ...]:
    try:
        budgets = parse_budgets(request.budget) if request.budget else run.config.budgets
    except ValueError as error:
        raise BadConfig(str(error)) from None
    return goals_of(run, budgets)


def own_table(run: Run, ranking: Ranking) -> SurfaceTable | None:
    """Return the run's table, where it was made with this configuration and ranking and has two seeds at least."""
    if not known_rows(run, ranking):
        return None
    table = read_table(run.store.path(NAME))
    return table if table.accuracies.shape[1] > 1 else None


def _judged_by_table(table: SurfaceTable, budgets: Sequence[Goal], each: Search, found: Decisions) -> Trace:
    try:
        judge = Judge(table, budgets, each.number)
    except ValueError as error:
        raise BadConfig(str(error)) from None
    regret = np.array([judge.regret(chosen) for chosen in found.chosen])
    return Trace(found.cost, found.cost, regret, judge.floor, judge.tau(found.surface), found.upfront)


def _chosen(made: Sequence[tuple[Search, Decisions]], max_cost: float) -> list[Cell]:
    """Return every cell that any search chose in the end."""
    return sorted({cell for _, found in made for cell in found.chosen[found.last(max_cost)]})


def judged_cells(run: Run, ranking: Ranking, cells: Sequence[Cell], seeds: int) -> dict[Cell, list[float]]:
    """Return the accuracies of cells in fresh trials, which are those that a table of the run would have.

    Raises:
        StageFailed: too many trials in a row failed, or all of a cell's did.
    """
    jobs, records = (
        [job_of(ranking.space, cell, seed) for seed in range(seeds) for cell in cells],
        records_of(run, ranking),
    )
    missing = [job for job in jobs if not records.has(job)]
    if missing:
        run.say(f"judging {len(cells)} cells by {seeds} trials each")
        run_missing(run, ranking, missing, records)
    known: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for job in jobs:
        record = records.read(job)
        if record is not None and record["accuracy"] is not None:
            known[job.cell].append(record["accuracy"])
    lacking = [cell for cell, accuracies in known.items() if not accuracies]
    if lacking:
        raise StageFailed(f"no trial that could judge the cell {lacking[0]} succeeded: try more --judge-seeds")
    return known


def _noise(tried: Mapping[Cell, Sequence[float]]) -> str:
    """Say how well the mean of a judged cell is known, where its trials tell."""
    several = [accuracies for accuracies in tried.values() if len(accuracies) > 1]
    if not several:
        return ""
    error = np.sqrt(np.mean([np.var(accuracies, ddof=1) / len(accuracies) for accuracies in several]))
    return f"; standard error of a cell's mean {error / POINT:.2f} points"


def judged_by_trials(means: Mapping[Cell, float], budgets: Sequence[Goal], found: Decisions, max_cost: float) -> Trace:
    """Return what a search's last decisions within the cost lose against the best judged cell of each budget."""
    lost = []
    for budget, cell in zip(budgets, found.chosen[found.last(max_cost)], strict=True):
        lost.append(max(means[each] for each in budget.cells if each in means) - means[cell])
    at = np.array([max_cost])
    return Trace(at, at, np.array([lost]), np.zeros(len(lost)), float("nan"), found.upfront)


def _curves(request: Request, searches: Sequence[Search], traces: Sequence[Trace], *, whole: bool) -> list[Curve]:
    steps = np.arange(1.0, np.floor(request.max_cost) + 1) if whole else np.zeros(0)
    grid = np.unique([*steps, request.max_cost])
    groups = {
        name: [[trace] for each, trace in zip(searches, traces, strict=True) if each.name == name]
        for name in request.names
    }
    return [mean_curve(name, group, grid) for name, group in groups.items()]


def decision_table(made: Sequence[tuple[Search, Decisions]], budgets: Sequence[Goal], max_cost: float) -> str:
    """Return one line per search: its trials, what they and its probe cost, and the cell that it chose per budget."""
    rows = []
    for each, found in made:
        position, trials = found.last(max_cost), ended(TrialLog(each.run.store))
        cells = (f"({cell.n_attn},{cell.n_act})" for cell in found.chosen[position])
        probe = f"{found.upfront:.2f}" if found.upfront else ""
        rows.append((each.name, str(each.number), str(len(trials)), f"{found.cost[-1]:.2f}", probe, *cells))
    return text_table(("search", "seed", "trials", "cost", "of it probe", *map(str, budgets)), rows)


def _write(out: RunStore, curves: Sequence[Curve], title: str, shown: str, *, whole: bool) -> str:
    """Write CSV, plot and page; return where the page is. Decisions that were judged at the end alone have no plot."""
    folder = out.path("").rstrip("/")
    if whole:
        write_curves(folder, "live", curves)
    else:
        write_bytes(f"{folder}/live.csv", csv_of(curves).encode())
    about = _ABOUT + (_BY_TABLE if whole else _BY_TRIALS)
    return write_page(folder, about, [("live", title, shown, whole)])
