"""The plot of accuracy against speed: what every amount of speed costs, and what was made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from dpt_search.pareto import Answer

_LOOKS: dict[str, dict[str, Any]] = {
    "predicted": {"color": "C0", "marker": "o", "fillstyle": "none"},
    "observed": {"color": "C0", "marker": "o"},
    "confirmed": {"color": "C0", "marker": "D"},
}


@dataclass(frozen=True)
class Tradeoff:
    """What is drawn; x is a gain over the dense model, such as a speedup, and accuracies are fractions.

    Attributes:
        label: of the x axis.
        rows: x and recommendation of every budget, with its predicted accuracy on val.
        chosen: the budget that is, or is to be, fine-tuned.
        front: answers to all budgets of that quantity; empty where it is not known.
        trials: x and observed accuracy on val of each finished trial.
        dense: accuracy, low and high of the dense model on val; None where it is not known.
        exported: x and the export's summary: accuracies on test and measured speedups; None before the export.
    """

    label: str
    rows: Sequence[tuple[float, Mapping[str, Any]]]
    chosen: str = ""
    front: Sequence[Answer] = ()
    trials: Sequence[tuple[float, float]] = ()
    dense: Mapping[str, Any] | None = None
    exported: tuple[float, Mapping[str, Any]] | None = None


def tradeoff(figure: Figure, told: Tradeoff) -> None:
    """Draw accuracy against speed: the dense model at the top left, the front with its uncertainty, the chosen cell."""
    axes = figure.subplots()
    axes.grid(True)
    axes.set_xlabel(told.label)
    axes.set_ylabel("accuracy, %")
    axes.xaxis.set_major_formatter("{x:.2g}x")
    for x, row in told.rows:
        is_chosen = row["budget"] == told.chosen
        look = _LOOKS[row["status"]] | ({"markersize": 10, "zorder": 4} if is_chosen else {})
        _interval(axes, x, row["mean"], row, look, f"recommended, {row['status']}")
        text, aside = row["budget"], (-5, -11)
        if is_chosen:
            text, aside = f"chosen: {text}", (-11, -14)
            axes.plot([x], [100 * row["mean"]], "o", fillstyle="none", markersize=17, color="C0", markeredgewidth=1.6)
        axes.annotate(
            text, (x, 100 * row["mean"]), aside, textcoords="offset points", fontsize=8.5, color="C0", ha="right",
            weight="bold" if is_chosen else "normal",
        )  # fmt: skip
    _marks(axes, told)
    _trial_dots(axes, told.trials)
    _front(axes, told.front)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles, loc="best")


def _marks(axes: Any, told: Tradeoff) -> None:
    """Draw the dense model, and the merged one with its test accuracies."""
    if told.dense is not None:
        look = {"color": "C0", "marker": "s"}
        _interval(axes, 1.0, told.dense["accuracy"], told.dense, look, "dense, on val", -4)
    if told.exported is not None:
        x, summary = told.exported
        before, after = summary["dense"], summary["merged"]
        _interval(axes, 1.0, before["accuracy"], before, {"color": "C1", "marker": "s"}, "dense, on test", 4)
        label = f"merged ({summary['budget']}), on test"
        _interval(axes, x, after["accuracy"], after, {"color": "C1", "marker": "*", "markersize": 11}, label)


def _front(axes: Any, front: Sequence[Answer]) -> None:
    """Draw the front and its band, as far as there is something to see: its steep end would squeeze the rest."""
    if not front:
        return
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    is_alone = not axes.has_data()
    if not is_alone:
        front = [each for each in front if 100 * each.mean > low - 0.5 * (high - low)] or front
    x = [each.gain for each in front]
    label = "front, all budgets, with 95 % interval"
    axes.plot(x, [100 * each.mean for each in front], color="C0", linewidth=1.4, alpha=0.7, label=label, zorder=1.5)
    ends = ([100 * each.low for each in front], [100 * each.high for each in front])
    axes.fill_between(x, *ends, color="C0", alpha=0.14, linewidth=0, zorder=1)
    if not is_alone:
        axes.set_xlim(left, min(axes.get_xlim()[1], right + (right - left)))


def _trial_dots(axes: Any, trials: Sequence[tuple[float, float]]) -> None:
    """Draw the trials, but do not let the worst of them squeeze the rest: those are only counted."""
    low, high = axes.get_ylim()
    shown = [(x, 100 * y) for x, y in trials if 100 * y > low - 0.5 * (high - low)]
    left_out = len(trials) - len(shown)
    label = f"trial, on val ({left_out} more below)" if left_out else "trial, on val"
    if shown:
        axes.scatter([x for x, _ in shown], [y for _, y in shown], s=14, color="C2", linewidth=0, label=label)


def _interval(
    axes: Any, x: float, y: float, ends: Mapping[str, float], look: dict[str, Any], label: str, offset: int = 0
) -> None:
    """Draw a point with its interval, moved aside by some typographic points where two would cover each other."""
    low, high = 100 * ends["low"], 100 * ends["high"]
    beside = axes.transData + ScaledTranslation(offset / 72, 0, axes.figure.dpi_scale_trans)
    axes.plot([x, x], [low, high], color=look["color"], linewidth=1.2, transform=beside)
    point = {"markersize": 6.5, "linestyle": "none", **look}
    axes.plot([x], [100 * y], **{"zorder": 3, **point}, label=label, transform=beside)
    # With a transform of its own it does not count for the limits.
    axes.update_datalim([(x, low), (x, high)])
    axes.autoscale_view()
