"""The run's results as text tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpt_search.progress import duration
from dpt_search.store import RunStore


def stage_times(store: RunStore) -> str:
    """Return seconds by stage, as of the latest time each was done."""
    rows = []
    for name in store.names("stages"):
        stamp = store.read_json(f"stages/{name}")
        rows.append((stamp["finished_at"], stamp["stage"], duration(stamp["seconds"])))
    ordered = [(stage, text) for _, stage, text in sorted(rows)]
    return text_table(("stage", "time"), ordered)


def recommendation_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per budget: cell, predicted accuracy and speedup, how sure, and the plan."""
    # Budgets of units are met by every cell on their line.
    limited = any("is_sure" in row for row in rows)
    batches = "/".join(rows[0]["speedup"]) if rows else ""
    header = ["budget", "cell", "val accuracy", f"speedup at {batches}", "best with", "status"]
    lines = []
    for row in rows:
        speedup = " / ".join(f"{value:.2f}x" for value in row["speedup"].values())
        cell, accuracy = f"({row['cell'][0]},{row['cell'][1]})", f"{row['mean']:.1%} ± {1.96 * row['sd']:.1%}"
        line = [row["budget"], cell, accuracy, speedup, f"{row['probability_best']:.0%}", row["status"]]
        lines.append([*line, *([_meets(row)] if limited else []), row["plan"]])
    return text_table([*header, *(["budget met"] if limited else []), "plan"], lines)


def _meets(row: dict[str, Any]) -> str:
    """Say how it is known that a recommended cell meets its budget."""
    if row.get("measured") is not None:
        return "as measured"
    return {True: "as predicted", False: "too close to say", None: "yes"}[row.get("is_sure")]


def result_table(store: RunStore) -> str:
    """Return dense against merged, and the formats: accuracy on test with intervals, size and measured speed."""
    summary = store.read_json("export/summary.json")
    if summary is None:
        return "nothing exported yet"
    dense, merged, baseline = summary["dense"], summary["merged"], summary.get("baseline")
    change = (baseline or summary)["difference"]
    rows: list[Sequence[str]] = [
        ("accuracy on test", _accuracy(dense), _accuracy(merged), _points(change)),
        ("parameters", f"{dense['params']:,}", f"{merged['params']:,}", _ratio(dense["params"], merged["params"])),
        ("MACs an image", _millions(dense["macs"]), _millions(merged["macs"]), _ratio(dense["macs"], merged["macs"])),
    ]
    for batch, timing in summary["timing"].items():
        per_second = [f"{int(batch) / timing[key]:,.0f} images/s" for key in ("dense_seconds", "merged_seconds")]
        rows.append((f"speed at batch {batch}", *per_second, _speedup(timing)))
    header = ["", "dense", "merged", "change"]
    if baseline:
        # Only its accuracy is another than the dense model's.
        header.insert(2, "dense, same training")
        rows = [(name, before, "" if n else _accuracy(baseline), *rest) for n, (name, before, *rest) in enumerate(rows)]
    how = ", speed of compiled models" if summary.get("compiled") else ""
    title = f"{summary['budget']}: {summary['plan']}  ({dense['images']} test images, {summary['device']}{how})"
    formats = f"\n\n{_format_table(summary)}" if "formats" in summary else ""
    # Exports of earlier versions have no verdict.
    told = f"\n\n{summary['verdict']['text']}" if "verdict" in summary else ""
    return f"{title}\n\n{text_table(header, rows)}{formats}{told}"


def _format_table(summary: dict[str, Any]) -> str:
    """Return one line per exported format; its speedup is over the dense model in PyTorch."""
    batches = list(summary["timing"])
    rows = []
    for row in summary["formats"].values():
        timed = [row["timing"].get(batch) for batch in batches]
        speeds = [
            f"{int(batch) / timing['seconds']:,.0f} images/s, {_speedup(timing)}" if timing else "not timed"
            for batch, timing in zip(batches, timed, strict=True)
        ]
        rows.append((row["file"], _accuracy(row), f"{row['agreement']:.2%}", *speeds))
    return text_table(
        ("exported as", "accuracy on test", "chooses as unmerged", *(f"batch {b}" for b in batches)), rows
    )


def _speedup(timing: dict[str, float]) -> str:
    return f"{timing['speedup']:.2f}x ({timing['low']:.2f} to {timing['high']:.2f})"


def _accuracy(found: dict[str, float]) -> str:
    return f"{found['accuracy']:.2%} ({found['low']:.2%} to {found['high']:.2%})"


def _points(change: dict[str, float]) -> str:
    return f"{100 * change['mean']:+.2f} points ({100 * change['low']:+.2f} to {100 * change['high']:+.2f})"


def _millions(value: float) -> str:
    return f"{value / 1e6:,.2f} M"


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}x fewer"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay text out in columns."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]
    ]
    return "\n".join([lines[0].rstrip(), "  ".join("-" * width for width in widths), *(x.rstrip() for x in lines[1:])])
