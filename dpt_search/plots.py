"""The report's plots. Accuracies come as fractions and are drawn as per cent; colours are safe for the colour-blind.

Every plot is a function that draws on an empty figure; `png` calls it once for light and once for dark paper.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

from dpt_search.store import Finished
from search_spaces.plan import KINDS, PruningPlan, Ranking
from search_spaces.ratios import RatioSpace

Draw = Callable[[Figure], None]

# Okabe and Ito's palette, in the tones that stand out on each paper.
_PAPERS: dict[str, dict[str, Any]] = {
    "light": {"ink": "#22262b", "quiet": "#8a929b", "paper": "#ffffff", "cycle": ["#0072B2", "#D55E00", "#009E73"]},
    "dark": {"ink": "#dfe3e8", "quiet": "#8a929b", "paper": "#1b1f24", "cycle": ["#56B4E9", "#E69F00", "#2fc79b"]},
}
_MARKERS = {"predicted": ("o", "none"), "observed": ("o", "full"), "confirmed": ("D", "full")}
_KIND_NAMES = {"attn": "attention", "act": "activation"}


def png(draw: Draw, size: tuple[float, float], paper: str) -> bytes:
    """Return a plot as PNG.

    Args:
        draw: draws on the empty figure it is given.
        size: width and height in inches.
        paper: `light` or `dark`.
    """
    with matplotlib.rc_context(_style(**_PAPERS[paper])):
        figure = Figure(figsize=size, dpi=160, layout="constrained")
        draw(figure)
        stream = io.BytesIO()
        # No version in the file: the same run gives the same bytes.
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _style(ink: str, quiet: str, paper: str, cycle: Sequence[str]) -> dict[str, Any]:
    return {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "xtick.color": quiet,
        "ytick.color": quiet,
        "axes.edgecolor": quiet,
        "grid.color": quiet,
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.prop_cycle": matplotlib.cycler(color=[*cycle, quiet]),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "font.size": 9.5,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    }


def _ink() -> str:
    return str(matplotlib.rcParams["text.color"])


def _paper() -> str:
    return str(matplotlib.rcParams["figure.facecolor"])


def surface(
    figure: Figure, found: Mapping[str, Any], trials: Sequence[Finished], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Draw the predicted accuracy of every cell, and beside it how unsure the prediction is.

    Args:
        figure: where to draw.
        found: `n_attn`, `n_act`, `mean` and `sd` of the posterior; rows count attentions, columns activations.
        trials: the trials that finished, drawn as dots in the colour of what they observed.
        rows: recommendations, drawn as stars on the lines of their budgets.
    """
    wide, narrow = figure.subplots(1, 2, width_ratios=(1, 0.52))
    mean, sd = 100 * np.asarray(found["mean"]), 100 * np.asarray(found["sd"])
    # The cliffs at the ends would eat the colours; what matters is the upper part.
    low = max(float(mean.min()), float(np.median(mean)) - 2.0 * float(mean.max() - np.median(mean)))
    norm = Normalize(low, float(mean.max()))
    image = _grid(wide, mean, "viridis", norm)
    wide.set_title("predicted accuracy on val")
    wide.set_ylabel("attentions removed")
    _bar(figure, image, wide, "%", "min" if low > mean.min() else "neither")
    _budget_lines(wide, rows, RatioSpace(found["n_attn"], found["n_act"]))
    _observations(wide, trials, norm)
    stars = [row["cell"] for row in rows]
    wide.scatter(
        [g for _, g in stars], [a for a, _ in stars], marker="*", s=150, color="white", edgecolor="black", zorder=4
    )
    narrow.set_title("its standard deviation")
    _bar(figure, _grid(narrow, sd, "Purples", Normalize(0, float(sd.max()))), narrow, "points", "neither")


def _grid(axes: Any, values: Any, colours: str, norm: Normalize) -> Any:
    image = axes.imshow(values, origin="lower", cmap=colours, norm=norm, aspect="equal")
    axes.set_xlabel("activations removed")
    for axis, size in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
        axis.set_ticks(range(0, size, max(1, round(size / 6))))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def _bar(figure: Figure, image: Any, axes: Any, unit: str, extend: str) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.82, aspect=24, pad=0.02, extend=extend)
    bar.ax.set_title(unit, fontsize=8.5, loc="left")
    bar.outline.set_visible(False)


def _budget_lines(axes: Any, rows: Sequence[Mapping[str, Any]], space: RatioSpace) -> None:
    for row in rows:
        quantity, _, units = row["budget"].partition("=")
        if quantity != "units" or not space.line(int(units)):
            continue
        line = space.line(int(units))
        axes.plot([c.n_act for c in line], [c.n_attn for c in line], color="white", linewidth=1, alpha=0.85, zorder=2)
        axes.annotate(
            units, (line[-1].n_act, line[-1].n_attn), xytext=(-3, 4), textcoords="offset points", color="white",
            fontsize=8, ha="left",
        )  # fmt: skip


def _observations(axes: Any, trials: Sequence[Finished], norm: Normalize) -> None:
    cells = defaultdict(list)
    for trial in trials:
        if trial.accuracy is not None:
            cells[PruningPlan.parse(trial.plan).cell].append(100 * trial.accuracy)
    axes.scatter(
        [c.n_act for c in cells], [c.n_attn for c in cells], c=[np.mean(v) for v in cells.values()], cmap="viridis",
        norm=norm, s=70, edgecolor="white", linewidth=1.2, zorder=3,
    )  # fmt: skip
    for cell, values in cells.items():
        if len(values) > 1:
            axes.annotate(
                f"{len(values)}", (cell.n_act, cell.n_attn), xytext=(5, 4), textcoords="offset points", color="white",
                fontsize=8, weight="bold", zorder=5,
            )  # fmt: skip


def tradeoff(
    figure: Figure,
    rows: Sequence[Mapping[str, Any]],
    batch: str,
    trials: Sequence[tuple[float, float]],
    dense: Mapping[str, Any] | None,
    exported: Mapping[str, Any] | None,
) -> None:
    """Draw accuracy against speedup.

    Args:
        figure: where to draw.
        rows: recommendations with their predicted accuracy on val and speedup.
        batch: the batch size of the speedups.
        trials: predicted speedup and observed accuracy on val of each finished trial.
        dense: accuracy, low and high of the dense model on val.
        exported: the export's summary: accuracies on test and measured speedups.
    """
    axes = figure.subplots()
    axes.grid(True)
    axes.set_xlabel(f"speedup at batch {batch}")
    axes.set_ylabel("accuracy, %")
    axes.xaxis.set_major_formatter("{x:.2g}x")
    axes.scatter(*(zip(*((x, 100 * y) for x, y in trials), strict=True)), s=14, color="C3", linewidth=0, label="trial")
    for row in rows:
        marker, fill = _MARKERS[row["status"]]
        x = row["speedup"][batch]
        _interval(axes, x, row["mean"], row["low"], row["high"], marker, fill, "C0", f"recommended, {row['status']}")
        axes.annotate(
            row["budget"], (x, 100 * row["mean"]), xytext=(7, 5), textcoords="offset points", fontsize=8.5, color="C0"
        )
    if dense is not None:
        _interval(axes, 1.0, dense["accuracy"], dense["low"], dense["high"], "s", "full", "C0", "dense, on val")
    if exported is not None:
        for name, marker, x in (("dense", "s", 1.0), ("merged", "*", exported["timing"][batch]["speedup"])):
            each = exported[name]
            label = f"{name}, measured on test"
            _interval(axes, x, each["accuracy"], each["low"], each["high"], marker, "full", "C1", label)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles, loc="lower left")


def _interval(
    axes: Any, x: float, y: float, low: float, high: float, marker: str, fill: str, colour: str, label: str
) -> None:
    axes.errorbar(
        [x], [100 * y], yerr=[[100 * (y - low)], [100 * (high - y)]], marker=marker, fillstyle=fill, color=colour,
        markersize=11 if marker == "*" else 6.5, elinewidth=1.2, linestyle="none", label=label, zorder=3,
    )  # fmt: skip


def recovery(figure: Figure, trials: Sequence[Finished], dense: float | None) -> None:
    """Draw every trial's accuracy from right after removal (epoch 0) to its last epoch."""
    axes = figure.subplots()
    axes.grid(True, axis="y")
    counts = [len(PruningPlan.parse(trial.plan)) for trial in trials]
    norm = Normalize(0, max(counts) or 1)
    colours = matplotlib.colormaps["viridis"].resampled(256)
    for trial in trials:
        cell = PruningPlan.parse(trial.plan).cell
        style = "-" if cell.n_attn > cell.n_act else "--" if cell.n_attn < cell.n_act else "-."
        first = np.nan if trial.removed_accuracy is None else trial.removed_accuracy
        values = 100 * np.array([first, *trial.accuracies])
        axes.plot(
            values, style, color=colours(norm(cell.total)), marker="o", markersize=3.5, linewidth=1.4, clip_on=False
        )
    epochs = max(len(trial.accuracies) for trial in trials)
    axes.set_xticks(range(epochs + 1), ["right after\nremoval", *map(str, range(1, epochs + 1))])
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy on val, %")
    _dense_line(axes, dense)
    styles = {"more attentions removed": "-", "as many of each": "-.", "more activations removed": "--"}
    handles = [Line2D([], [], linestyle=style, color=_ink(), linewidth=1.2) for style in styles.values()]
    axes.legend(handles, styles, loc="lower right")
    _bar(figure, matplotlib.cm.ScalarMappable(norm, colours), axes, "units", "neither")


def _dense_line(axes: Any, dense: float | None) -> None:
    if dense is not None:
        axes.axhline(100 * dense, color="C1", linewidth=1, zorder=1)
        axes.annotate(
            "dense", (0, 100 * dense), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
            color="C1", fontsize=8.5,
        )  # fmt: skip


def finetune(figure: Figure, epochs: Sequence[Mapping[str, Any]], dense: float | None) -> None:
    """Draw the long fine-tune: accuracy on val and training loss after every epoch."""
    panels = figure.subplots(1, 2, width_ratios=(1, 0.6))
    numbers = [epoch["epoch"] for epoch in epochs]
    titles = ("accuracy on val, %", "training loss")
    for axes, title, key, scale in zip(panels, titles, ("accuracy", "loss"), (100, 1), strict=True):
        axes.grid(True, axis="y")
        axes.plot(numbers, [scale * epoch[key] for epoch in epochs], color="C0", marker="o", markersize=4)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    _dense_line(panels[0], dense)


def plan(figure: Figure, removed: PruningPlan, ranking: Ranking, importance: Mapping[str, Sequence[float]]) -> None:
    """Draw which units of which block stay, shaded by importance within their kind."""
    axes = figure.subplots()
    blocks = 1 + max((i for kind in KINDS for i in getattr(ranking, kind)), default=0)
    for y, kind in enumerate(reversed(KINDS)):
        known = dict(zip(getattr(ranking, kind), importance[kind], strict=True))
        largest = max(known.values(), default=0) or 1
        for x in range(blocks):
            shade = known[x] / largest if x in known else None
            _unit(axes, x, y, shade, x in getattr(removed, kind))
    axes.set_xlim(-0.5, blocks - 0.5)
    axes.set_ylim(-0.55, len(KINDS) - 0.45)
    axes.set_aspect("equal")
    axes.set_xticks(range(blocks))
    axes.set_yticks(range(len(KINDS)), [_KIND_NAMES[kind] for kind in reversed(KINDS)])
    axes.set_xlabel("block, from the input")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _unit(axes: Any, x: int, y: int, shade: float | None, removed: bool) -> None:
    colour = matplotlib.colormaps["Blues"](0.25 + 0.65 * shade) if shade is not None else "none"
    box = {"boxstyle": "round,pad=0,rounding_size=0.12", "linewidth": 1.2}
    look = {"facecolor": "none", "edgecolor": "C3", "linestyle": (0, (2, 2))} if removed else {"facecolor": colour}
    axes.add_patch(FancyBboxPatch((x - 0.4, y - 0.4), 0.8, 0.8, **box, **look))
    if removed:
        axes.plot(x, y, marker="x", color="C1", markersize=9, markeredgewidth=2)
