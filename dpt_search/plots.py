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
from matplotlib.colors import ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.patheffects import withStroke
from matplotlib.rcsetup import cycler

from dpt_search.store import Finished
from search_spaces.plan import KINDS, PruningPlan, Ranking
from search_spaces.ratios import RatioSpace

Draw = Callable[[Figure], None]

# Okabe and Ito's palette, in the tones that stand out on each paper.
_PAPERS: dict[str, dict[str, Any]] = {
    "light": {"ink": "#22262b", "quiet": "#8a929b", "paper": "#ffffff", "cycle": ["#0072B2", "#D55E00"]},
    "dark": {"ink": "#dfe3e8", "quiet": "#8a929b", "paper": "#1b1f24", "cycle": ["#56B4E9", "#E69F00"]},
}


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
        figure.savefig(stream, format="png", bbox_inches="tight", pad_inches=0.06, metadata={"Software": None})
    return stream.getvalue()


def _style(ink: str, quiet: str, paper: str, cycle: Sequence[str]) -> dict[str, Any]:
    inked = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor")
    return {
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor", "grid.color"), quiet),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        "axes.prop_cycle": cycler(color=[*cycle, quiet, ink]),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "font.size": 9.5,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    }


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
    # The cliffs at the ends would eat the colours; what matters is where the recommendations are.
    top, bottom = float(mean.max()), float(mean.min())
    worst = min((100 * row["mean"] for row in rows), default=bottom)
    low = max(bottom, top - max(3.5 * (top - worst), 0.25 * (top - bottom)))
    norm = Normalize(low, top)
    image = _grid(wide, mean, "viridis", norm)
    wide.set_title("predicted accuracy on val")
    wide.set_ylabel("attentions removed")
    _bar(wide, image, "%", "min" if low > bottom else "neither")
    _budget_lines(wide, rows, RatioSpace(found["n_attn"], found["n_act"]))
    _observations(wide, trials, norm)
    for n_attn, n_act in (row["cell"] for row in rows):
        wide.plot(n_act, n_attn, "*", markersize=20, color="white", markeredgecolor="black", zorder=2.5)
    narrow.set_title("its standard deviation")
    _bar(narrow, _grid(narrow, sd, "Purples", PowerNorm(0.5, 0, float(sd.max()))), "points")


def _grid(axes: Any, values: Any, colours: str, norm: Normalize) -> Any:
    image = axes.imshow(values, origin="lower", cmap=colours, norm=norm, aspect="equal")
    axes.set_anchor("SW")
    axes.set_xlabel("activations removed")
    for axis, size in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
        axis.set_ticks(range(0, size, max(1, round(size / 6))))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def _bar(axes: Any, image: Any, unit: str, extend: str = "neither", height: float = 0.94) -> Any:
    bar = axes.figure.colorbar(image, cax=axes.inset_axes([1.03, 0, 0.035, height]), extend=extend)
    bar.ax.set_title(unit, fontsize=8.5, loc="left")
    bar.outline.set_visible(False)
    return bar


def _budget_lines(axes: Any, rows: Sequence[Mapping[str, Any]], space: RatioSpace) -> None:
    for row in rows:
        quantity, _, value = row["budget"].partition("=")
        # Runs of earlier versions have budgets of units only, and no candidates.
        line = row.get("candidates") or [(cell.n_attn, cell.n_act) for cell in space.line(int(value))]
        y, x = zip(*line[::-1], strict=True)
        axes.plot(x, y, color="white", linewidth=1, path_effects=_halo(2.2), zorder=2)
        _note(axes, value if quantity == "units" else row["budget"], x[0], y[0], (-3, 8))


def _note(axes: Any, text: str, x: float, y: float, offset: tuple[int, int]) -> None:
    axes.annotate(
        text, (x, y), xytext=offset, textcoords="offset points", color="white", fontsize=8.5, path_effects=_halo(2),
        zorder=5,
    )  # fmt: skip


def _halo(width: float) -> list[Any]:
    """Return what keeps white readable on the light end of the colours."""
    return [withStroke(linewidth=width, foreground="#333333")]


def _observations(axes: Any, trials: Sequence[Finished], norm: Normalize) -> None:
    cells = defaultdict(list)
    for trial in trials:
        if trial.accuracy is not None:
            cells[PruningPlan.parse(trial.plan).cell].append(100 * trial.accuracy)
    x, y, values = [c.n_act for c in cells], [c.n_attn for c in cells], [np.mean(v) for v in cells.values()]
    axes.scatter(x, y, s=105, color="#333333", linewidth=0, zorder=3)
    axes.scatter(x, y, c=values, cmap="viridis", norm=norm, s=62, edgecolor="white", linewidth=1.4, zorder=3)
    for cell, repeats in cells.items():
        if len(repeats) > 1:
            _note(axes, f"{len(repeats)}", cell.n_act, cell.n_attn, (6, 4))


def recovery(figure: Figure, trials: Sequence[Finished], dense: float | None) -> None:
    """Draw every trial's accuracy from right after removal (epoch 0) to its last epoch."""
    axes = figure.subplots()
    axes.grid(True, axis="y")
    most = max(1, *(len(PruningPlan.parse(trial.plan)) for trial in trials))
    norm = Normalize(0, most)
    # Neither end of the colours is lost on either paper.
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.15, 0.88, 256)))
    for trial in trials:
        cell = PruningPlan.parse(trial.plan).cell
        style = "-" if cell.n_attn > cell.n_act else "--" if cell.n_attn < cell.n_act else "-."
        first = np.nan if trial.removed_accuracy is None else trial.removed_accuracy
        values = 100 * np.array([first, *trial.accuracies])
        axes.plot(values, style, color=colours(norm(cell.total)), marker="o", markersize=3.5, linewidth=1.4)
    epochs = max(len(trial.accuracies) for trial in trials)
    ticks = range(0, epochs + 1, 1 + epochs // 12)
    axes.set_xticks(ticks, ["right after\nremoval", *map(str, ticks[1:])])
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy on val, %")
    _dense_line(axes, dense)
    styles = {"more attentions removed": "-", "as many of each": "-.", "more activations removed": "--"}
    handles = [Line2D([], [], linestyle=style, color="C3", linewidth=1.2) for style in styles.values()]
    axes.legend(handles, styles, loc="lower right")
    bar = _bar(axes, matplotlib.cm.ScalarMappable(norm, colours), "units", height=0.7)
    bar.set_ticks(range(0, most + 1, 1 + most // 7))


def _dense_line(axes: Any, dense: float | None) -> None:
    if dense is not None:
        axes.axhline(100 * dense, color="C1", linewidth=1, zorder=1)
        axes.annotate(
            "dense", (1, 100 * dense), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            color="C1", fontsize=8.5, va="center",
        )  # fmt: skip


def finetune(figure: Figure, epochs: Sequence[Mapping[str, Any]], dense: float | None) -> None:
    """Draw the long fine-tune: accuracy on val and training loss after every epoch."""
    panels = figure.subplots(1, 2, width_ratios=(1, 0.6))
    look = {"color": "C0", "marker": "o" if len(epochs) < 40 else "", "markersize": 4}
    titles = ("accuracy on val, %", "training loss")
    for axes, title, key, scale in zip(panels, titles, ("accuracy", "loss"), (100, 1), strict=True):
        axes.grid(True, axis="y")
        axes.plot([epoch["epoch"] for epoch in epochs], [scale * epoch[key] for epoch in epochs], **look)
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
    axes.set(xlim=(-0.5, blocks - 0.5), ylim=(-0.55, 1.55), aspect="equal", xlabel="block, from the input")
    axes.set_xticks(range(blocks))
    axes.set_yticks((0, 1), ["activation", "attention"])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _unit(axes: Any, x: int, y: int, shade: float | None, removed: bool) -> None:
    box = FancyBboxPatch((x - 0.4, y - 0.4), 0.8, 0.8, boxstyle="round,pad=0,rounding_size=0.12", linewidth=1.2)
    box.set_edgecolor("C2" if removed or shade is None else "none")
    box.set_facecolor("none" if removed or shade is None else matplotlib.colormaps["Blues"](0.25 + 0.65 * shade))
    axes.add_patch(box)
    if removed:
        box.set_linestyle((0, (2, 2)))
        axes.plot(x, y, marker="x", color="C1", markersize=9, markeredgewidth=2)
