"""What a comparison came to: a printed table, a CSV and a plot of regret against cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna

from dpt_search.compare import POINT, Curve, compare
from dpt_search.config import BadConfig
from dpt_search.strategies import STRATEGIES
from dpt_search.summary import text_table
from dpt_search.surface_table import read_table
from search_spaces.budgets import Budget, parse_budgets
from search_spaces.ratios import RatioSpace

TARGETS = (0.25, 0.15)
"""Regret above the noise floor, in points, whose cost is told."""


def run_comparison(
    tables: Sequence[str], names: str, budget: str, workers: int, seeds: int, max_trials: int, out: str
) -> Iterator[str]:
    """Compare on one table after another, and yield what to print.

    Args:
        tables: where they are.
        names: strategies, separated by commas; empty for all.
        budget: text form; empty for `default_budgets`.
        workers: trials at a time.
        seeds: replays of every strategy.
        max_trials: trials of every replay.
        out: folder for CSV and plot; empty for none.

    Raises:
        BadConfig: a strategy is unknown or a number makes no sense.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()] or list(STRATEGIES)
    unknown = sorted(set(chosen) - set(STRATEGIES))
    if unknown:
        raise BadConfig(f"no strategy {unknown[0]!r}: use some of {', '.join(STRATEGIES)}")
    if min(workers, seeds, max_trials) < 1:
        raise BadConfig("--workers, --seeds and --max-trials must be at least 1")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for location in tables:
        table = read_table(location)
        try:
            budgets = list(parse_budgets(budget)) if budget else default_budgets(table.space)
            curves = compare(table, chosen, budgets, seeds=seeds, workers=workers, max_trials=max_trials)
        except ValueError as error:
            raise BadConfig(f"{location}: {error}") from None
        yield f"{location}: {len(table.cells)} cells, {table.accuracies.shape[1]} seeds; {', '.join(map(str, budgets))}"
        yield f"\n{comparison_table(curves)}\n"
        if out:
            folder = Path(out)
            folder.mkdir(parents=True, exist_ok=True)
            write_csv(folder / f"{Path(location).stem}.csv", curves)
            write_plot(folder / f"{Path(location).stem}.png", curves, Path(location).stem)


def default_budgets(space: RatioSpace) -> list[Budget]:
    """Return every second number of units from 4 up to 5/6 of all."""
    return [Budget(units) for units in range(min(4, space.total), 5 * space.total // 6 + 1, 2)]


def comparison_table(curves: Sequence[Curve]) -> str:
    """Return one line per strategy, the cheapest to the last target first; cost is in trials of the dense model."""
    last = len(curves[0].cost) - 1
    shown = sorted({min(step - 1, last) for step in (5, 10, 20, 40)})
    header = (
        "strategy",
        *(f"to {target} points" for target in TARGETS),
        *(f"regret at {curves[0].cost[i]:.0f}" for i in shown),
        f"best cell at {curves[0].cost[last]:.0f}",
    )
    rows = []
    for curve in sorted(curves, key=lambda c: (c.cost_to(TARGETS[-1]), c.mean[last])):
        costs = (f"{cost:.0f}" if (cost := curve.cost_to(target)) < float("inf") else "never" for target in TARGETS)
        regrets = (
            f"{curve.mean[i] / POINT:.2f} ({curve.low[i] / POINT:.2f} to {curve.high[i] / POINT:.2f})" for i in shown
        )
        rows.append((curve.name, *costs, *regrets, f"{curve.hit_rate[last]:.0%}"))
    return text_table(header, rows)


def write_csv(path: Path, curves: Sequence[Curve]) -> None:
    """Write every point of every curve; regrets are in units of accuracy."""
    stream = io.StringIO()
    rows = csv.writer(stream)
    rows.writerow(["strategy", "cost", "mean", "low", "high", "lower_quartile", "upper_quartile", "hit_rate"])
    for curve in curves:
        for i, cost in enumerate(curve.cost):
            rows.writerow(
                [
                    curve.name,
                    cost,
                    curve.mean[i],
                    curve.low[i],
                    curve.high[i],
                    *curve.quartiles[:, i],
                    curve.hit_rate[i],
                ]
            )
    path.write_text(stream.getvalue())


def write_plot(path: Path, curves: Sequence[Curve], title: str) -> None:
    """Draw regret above the noise floor against cost, with 95 % bands; pure searches are grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    colours = {"map": "#0072b2", "gp-lattice": "#d55e00", "walk": "#009e73"}
    for number, curve in enumerate(sorted(curves, key=lambda c: c.name in colours)):
        colour = colours.get(curve.name, str(0.45 + 0.4 * number / max(1, len(curves))))
        width = 2.2 if curve.name in colours else 1.0
        axes.plot(curve.cost, curve.mean / POINT, color=colour, lw=width)
        axes.fill_between(curve.cost, curve.low / POINT, curve.high / POINT, color=colour, alpha=0.15, lw=0)
        axes.annotate(
            curve.name, (curve.cost[-1], curve.mean[-1] / POINT), (4, 0), textcoords="offset points", va="center",
            color=colour, fontsize=8,
        )  # fmt: skip
    axes.set(xlabel="cost, in trials of the dense model", ylabel="regret above the noise floor, points", title=title)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=-0.05)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
