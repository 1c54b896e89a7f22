"""What a comparison came to: printed tables, CSV, plots of regret against cost, and a page with all of it."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna

from dpt_search.blend import Blend
from dpt_search.compare import POINT
from dpt_search.config import BadConfig
from dpt_search.curves import Curve, mean_curve
from dpt_search.hints import carried_over
from dpt_search.map_predictor import Array
from dpt_search.map_sampler import ratios
from dpt_search.posterior import Data
from dpt_search.probe_seeds import read_probes
from dpt_search.replays import compare
from dpt_search.strategies import INHERITED, STRATEGIES
from dpt_search.summary import text_table
from dpt_search.surface_table import SurfaceTable, read_table
from dpt_search.walk_table import read_walks
from search_spaces.budgets import parse_budgets
from search_spaces.goals import Goal, goals, unit_goals
from search_spaces.ratios import RatioSpace
from trainables.locations import is_dir, read_bytes, write_bytes

TARGETS = (0.25, 0.15)
"""Regret above the noise floor, in points, whose cost is told."""
_STEP = 0.5
"""Of the costs at which regret is told, in trials of the dense model."""
_ABOUT = (
    "Each strategy was replayed over tables of real trials, at equal cost. A replay observes the values of one seed "
    "and is judged on the mean of the others. Regret is the accuracy lost by what would be chosen at that cost; the "
    "noise floor is the regret of choosing by all that could have been observed, and is taken off. One unit of cost "
    "is a trial of the dense model; a probe's training and evaluation count from the start. Intervals are 95 % over "
    "the replays of a table."
)


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        tables: where the tables are; a table's probes lie beside it.
        names: keys of `STRATEGIES`; none for all.
        budget: text form; empty for the default of `budgets_of`.
        workers: trials at a time; several numbers are compared by the time and the cost that they need.
        seeds: replays of every strategy.
        max_trials: trials of every replay.
        each: one budget after another, each on its own.
        prior: table of an earlier run, for the strategies that take one; empty for none.
        out: folder for CSV, plots and page; empty for none.
        processes: replays at a time, on a core each.
    """

    tables: Sequence[str]
    names: Sequence[str]
    budget: str
    workers: Sequence[int]
    seeds: int
    max_trials: int
    each: bool
    prior: str
    out: str
    processes: int = 1

    def check(self) -> None:
        """Refuse what cannot be compared.

        Raises:
            BadConfig: a strategy is unknown or a number makes no sense.
        """
        unknown = sorted(set(self.names) - set(STRATEGIES))
        if unknown:
            raise BadConfig(f"no strategy {unknown[0]!r}: use some of {', '.join(STRATEGIES)}")
        if min(*self.workers, self.seeds, self.max_trials, self.processes) < 1:
            raise BadConfig("--workers, --seeds, --max-trials and --processes must be at least 1")


def run_comparison(request: Request) -> Iterator[str]:
    """Compare on one table after another, and yield what to print.

    Raises:
        BadConfig: the request makes no sense.
        BadRun: a table cannot be read.
    """
    request.check()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shown = []
    for location in request.tables:
        table = read_table(location)
        try:
            budgets = budgets_of(request.budget, table.space)
            groups = [_curves(request, location, table, budgets, workers) for workers in request.workers]
        except ValueError as error:
            raise BadConfig(f"{location}: {error}") from None
        together = "one at a time" if request.each else "together"
        title = (
            f"{location}: {len(table.cells)} cells, {table.accuracies.shape[1]} seeds; "
            f"{', '.join(map(str, budgets))}, {together}; noise floor {groups[0][0][0].floor / POINT:.2f} points"
        )
        yield title
        tables = [f"workers={w}\n{comparison_table(c)}" for w, (c, _) in zip(request.workers, groups, strict=True)]
        if len(groups) > 1:
            tables = [scaling_table(request.workers, groups)]
        yield "\n" + "\n\n".join(tables) + "\n"
        shown.append((Path(location).stem, title, "\n\n".join(tables), groups[0][0]))
        if request.out:
            write_curves(request.out, shown[-1][0], groups[0][0])
    if request.out:
        yield f"page: {write_page(request.out, _ABOUT, [(*each[:3], True) for each in shown])}"


def write_curves(folder: str, name: str, curves: Sequence[Curve]) -> None:
    """Write NAME.csv and NAME.png into a folder: a path or URI."""
    write_bytes(f"{folder.rstrip('/')}/{name}.csv", csv_of(curves).encode())
    write_bytes(f"{folder.rstrip('/')}/{name}.png", plot_of(curves, name))


def _curves(
    request: Request, location: str, table: SurfaceTable, budgets: Sequence[Goal], workers: int
) -> tuple[list[Curve], list[Curve]]:
    """Return every strategy's curve over cost, and over virtual time."""
    walks = read_walks(beside(location, "walks"))
    # Of all strategies that one needs what few tables have.
    names = request.names or [name for name in STRATEGIES if walks or name != INHERITED]
    found = compare(
        table, names, budgets, seeds=request.seeds, workers=workers, max_trials=request.max_trials,
        each=request.each, probes=read_probes(beside(location, "probes")), prior=_prior(request.prior, table.space),
        walks=walks, processes=request.processes,
    )  # fmt: skip
    grid = np.arange(_STEP, request.max_trials + _STEP, _STEP)
    # Many workers are done early: time is told in quarters.
    times = np.arange(0.25, request.max_trials + 0.25, 0.25)
    by_time = [mean_curve(name, traces, times, "time") for name, traces in found.items()]
    return [mean_curve(name, traces, grid) for name, traces in found.items()], by_time


def beside(location: str, what: str) -> str:
    """Return where a table's `probes` or `walks` are: beside it, `WHAT.parquet` in a run, else `NAME.WHAT.parquet`."""
    if is_dir(location):
        return f"{location.rstrip('/')}/{what}.parquet"
    stem = location.removesuffix(".parquet")
    return f"{stem.removesuffix('table')}{what}.parquet" if stem.endswith("/table") else f"{stem}.{what}.parquet"


def _prior(location: str, space: RatioSpace) -> Array | None:
    """Return the surface that a search of another table would have ended with, as a prior of this space."""
    if not location:
        return None
    table = read_table(location)
    index = {cell: i for i, cell in enumerate(table.space)}
    data = Data.of(np.array([index[cell] for cell in table.cells]), np.nanmean(table.accuracies, axis=1))
    mean = Blend(ratios(table.space), dense=table.dense).posterior(data).mean
    return carried_over(mean, table.space, space)


def budgets_of(text: str, space: RatioSpace) -> tuple[Goal, ...]:
    """Return the budgets that a text names, or by default every second number of units from 4 up to 5/6 of all.

    Raises:
        ValueError: the text cannot be read, or a budget is larger than the space or not one of units.
    """
    if text:
        return goals(parse_budgets(text), space)
    return unit_goals(space, *range(min(4, space.total), 5 * space.total // 6 + 1, 2))


def comparison_table(curves: Sequence[Curve]) -> str:
    """Return one line per strategy, the cheapest to the last target first; cost is in trials of the dense model.

    The columns `behind` are differences to the first strategy, taken seed by seed.
    """
    first, last = curves[0], len(curves[0].cost) - 1
    shown = sorted({int(np.argmin(np.abs(first.cost - cost))) for cost in (5, 10, 20, 40)})
    told = [i for i in shown if np.isfinite(first.mean[i])][:2] if len(curves) > 1 else []
    # Decisions that were judged at the end alone do not tell how early they were as good.
    targets = TARGETS if last else ()
    header = (
        "strategy",
        "replays",
        *(f"to {target} points" for target in targets),
        *(f"regret at {first.cost[i]:g}" for i in shown),
        *(f"behind {first.name} at {first.cost[i]:g}" for i in told),
        f"best cell at {first.cost[last]:g}",
        "tau",
    )
    rows = []
    for curve in sorted(curves, key=lambda c: (c.cost_to(TARGETS[-1]), c.mean[last])):
        costs = (_cost(curve.cost_to(target)) for target in targets)
        regrets = (_points(curve.mean[i], curve.low[i], curve.high[i]) for i in shown)
        behind = ("" if curve is first else _points(*curve.behind(first, i)) for i in told)
        tau = f"{curve.tau:.2f}" if np.isfinite(curve.tau) else ""
        rows.append(
            (curve.name, str(len(curve.replays)), *costs, *regrets, *behind, f"{curve.hit_rate[last]:.0%}", tau)
        )
    return text_table(header, rows)


def _points(mean: float, low: float, high: float) -> str:
    if not np.isfinite(mean):
        return "probing"
    interval = f" ({low / POINT:.2f} to {high / POINT:.2f})" if np.isfinite(low) else ""
    return f"{mean / POINT:.2f}{interval}"


def _cost(cost: float) -> str:
    return f"{cost:g}" if cost < float("inf") else "never"


def scaling_table(workers: Sequence[int], groups: Sequence[tuple[list[Curve], list[Curve]]]) -> str:
    """Return, per strategy and number of workers, virtual time and total cost to the last target."""
    target = TARGETS[-1]
    header = ("strategy", *(f"{count} worker{'s' * (count > 1)}" for count in workers))
    rows = []
    for number, curve in enumerate(groups[0][0]):
        pairs = [(by_time[number].cost_to(target), by_cost[number].cost_to(target)) for by_cost, by_time in groups]
        rows.append((curve.name, *(f"{_cost(time)} / {_cost(cost)}" for time, cost in pairs)))
    return f"time / cost to {target} points, in trials of the dense model\n" + text_table(header, rows)


def csv_of(curves: Sequence[Curve]) -> str:
    """Return every point of every curve as CSV; regrets are in units of accuracy."""
    stream = io.StringIO()
    rows = csv.writer(stream)
    rows.writerow(["strategy", "cost", "mean", "low", "high", "lower_quartile", "upper_quartile", "hit_rate"])
    for curve in curves:
        for i, cost in enumerate(curve.cost):
            regrets = (curve.mean[i], curve.low[i], curve.high[i], *curve.quartiles[:, i])
            rows.writerow([curve.name, cost, *regrets, curve.hit_rate[i]])
    return stream.getvalue()


_COLOURS = {"map": "#0072b2", "map/probe": "#332288", "map/no-probe": "#56b4e9", "map/prior": "#cc79a7"}
_COLOURS |= {"gp-lattice": "#d55e00", "walk": "#009e73"}
_PURE_COLOURS = ("#222222", "#666666", "#999999")
"""Of the best pure searches; the others are thin and have no name."""


def plot_of(curves: Sequence[Curve], title: str) -> bytes:
    """Draw regret above the noise floor against cost, as PNG; 95 % bands for what is not pure search."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    pure = sorted((c for c in curves if c.name not in _COLOURS), key=lambda c: (c.cost_to(TARGETS[-1]), c.mean[-1]))
    best = dict(zip((each.name for each in pure), _PURE_COLOURS, strict=False))
    for each in [*pure[::-1], *(c for c in curves if c.name in _COLOURS)]:
        colour = {**best, **_COLOURS}.get(each.name, "#d8d8d8")
        named = each.name if each.name in best or each.name in _COLOURS else None
        width = 2.2 if each.name in _COLOURS else 1.3 if named else 0.8
        axes.plot(each.cost, each.mean / POINT, color=colour, lw=width, label=named)
        if each.name in _COLOURS:
            axes.fill_between(each.cost, each.low / POINT, each.high / POINT, color=colour, alpha=0.1, lw=0)
    axes.axhline(TARGETS[-1], color="#222222", lw=0.8, ls=":")
    axes.annotate(f"{TARGETS[-1]} points", (axes.get_xlim()[1], TARGETS[-1]), (-4, 3), textcoords="offset points",
                  ha="right", fontsize=8)  # fmt: skip
    axes.set(xlabel="cost, in trials of the dense model", ylabel="regret above the noise floor, points", title=title)
    axes.set_yscale("symlog", linthresh=0.2, linscale=0.8)
    axes.set_ylim(bottom=-0.2)
    ticks = [-0.1, 0, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=140)
    return stream.getvalue()


def write_page(folder: str, about: str, shown: Sequence[tuple[str, str, str, bool]]) -> str:
    """Write one self-contained page and return where it is.

    Args:
        folder: where plots lie and the page goes.
        about: how it was compared.
        shown: per section its name, what was compared, the printed table, and whether it has a plot.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("dpt_search", "."), autoescape=True, undefined=StrictUndefined)
    place = folder.rstrip("/")
    sections = [
        {
            "name": name, "title": title, "table": table,
            "plot": base64.b64encode(read_bytes(f"{place}/{name}.png")).decode() if plotted else "",
        }
        for name, title, table, plotted in shown
    ]  # fmt: skip
    page = environment.get_template("compare.html.jinja").render(about=about, sections=sections)
    write_bytes(f"{place}/compare.html", page.encode())
    return f"{place}/compare.html"
