"""The page about timm's models, docs/models.md, from the rows of `census.py` and `model_sweep.py`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import timm
import torch

Row = dict[str, Any]

HEAD = """# What of timm's models can be removed

```
python benchmarks/census.py         # what is a transformer here: benchmarks/results/census.csv, a row per name
python benchmarks/model_sweep.py    # what can be removed of it: benchmarks/results/models.csv, and this page
```
made with timm {timm} and torch {torch}. `dpt-search doctor --model NAME` says the same of one model, with any
`--model.kwargs`.

**{counting} of the {names} names of `timm.list_models()` count**: they have at least 4 blocks that each hold a
softmax attention and two `nn.Linear` with one activation between. The census knows no family: it runs every model once
and follows what becomes of the image (`benchmarks/structure.py`). A norm, a convolution or a gate between the two
linear layers, or fewer such blocks, and a model does not count; it may be supported nevertheless.

**Attentions and activations can be removed in {both} of these {counting}, {both_share:.1%}**: in every block in
{supported} of them, {share:.1%} (*supported*), in others not in all blocks (*partly*, which says why not).

Tried out, half of the units of each kind being removed and merged, were {real} names with random weights, where gates
at 0, the removal and the merged model compute the same within 1e-4 of the largest output (the worst was {worst:.0e}),
and {meta} larger on the meta device, which shows shapes and parameters only. The {asked} others that have units
were asked, and not tried; {left} names were not looked at. Names that differ by their weights alone are tried once.
"""


def page(rows: Sequence[Row], census: dict[str, Row]) -> str:
    """Return the page in Markdown."""
    counting = [row for row in rows if _counts(row)]
    others = [row for row in rows if not _counts(row)]
    offering = [row for row in others if row["verdict"] != "refused"]
    attending = [row for row in others if row["verdict"] == "refused" and _attends(census[row["name"]])]
    rest = [row for row in others if row not in offering and row not in attending]
    parts = [
        _head(rows, counting, len(census)),
        f"## Models that count: {len(counting)} names",
        _table(counting),
        f"## Models that do not count, and have units: {len(offering)} names",
        _table(offering),
        f"## Models with softmax attentions that are refused: {len(attending)} names",
        "They do not count: fewer than 4 of their blocks have both.\n",
        _table(attending),
        f"## All others: {len(rest)} names",
        f"They have no softmax attention: {', '.join(sorted({row['class'] for row in rest if row['class']}))}.",
    ]
    failed = [f"- {row['name']}: {row['why_not']}" for row in census.values() if row["why_not"].startswith("cannot")]
    if failed:
        parts += ["", "What could not be built or run:", *failed]
    return "\n".join(parts) + "\n"


def _head(rows: Sequence[Row], counting: Sequence[Row], names: int) -> str:
    real = [row for row in rows if row["tried"] and row["tried"] != "meta"]
    supported, partly = (sum(row["verdict"] == word for row in counting) for word in ("supported", "partly"))
    both = supported + partly
    return HEAD.format(
        timm=timm.__version__, torch=torch.__version__.partition("+")[0], counting=len(counting), names=names,
        supported=supported, share=supported / max(1, len(counting)),
        both=both, both_share=both / max(1, len(counting)), real=len(real),
        meta=sum(row["tried"] == "meta" for row in rows), left=names - len(rows),
        asked=sum(row["verdict"] not in ("refused", "wrong") and not row["tried"] for row in rows),
        worst=max((float(row["difference"]) for row in real if row["difference"]), default=0.0),
    )  # fmt: skip


def _counts(row: Row) -> bool:
    return str(row["counts"]) == "True"


def _attends(counted: Row) -> bool:
    return int(counted["attentions"] or 0) > 0


def _table(rows: Sequence[Row]) -> str:
    """Return a line per class, verdict and reason: names, and how many of them were tried how."""

    def key(row: Row) -> tuple[str, str, str]:
        return row["class"], row["verdict"], row["reason"]

    lines = ["| class | names | verdict | with weights | on meta | why |", "|---|---|---|---|---|---|"]
    for (name, verdict, reason), group in groupby(sorted(rows, key=key), key):
        same = list(group)
        meta = sum(row["tried"] == "meta" for row in same)
        real = sum(bool(row["tried"]) for row in same) - meta
        lines.append(f"| {name} | {len(same)} | {verdict} | {real} | {meta} | {reason} |")
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> list[str]:
    """Return the share that is supported, and every name of the denominator that is not."""
    counting = [row for row in rows if _counts(row)]
    short = [row for row in counting if row["verdict"] != "supported"]
    wrong = [f"WRONG {row['name']}: {row['reason']}" for row in rows if row["verdict"] == "wrong"]
    supported = len(counting) - len(short)
    both = supported + sum(row["verdict"] == "partly" for row in short)
    of = max(1, len(counting))
    share = (
        f"of {len(counting)} names that count, {supported} have units of both kinds in every block "
        f"({supported / of:.1%}), {both} have units of both kinds ({both / of:.1%})"
    )
    exceptions = [f"{row['name']} ({row['class']}): {row['verdict']}: {row['reason']}" for row in short]
    return [*exceptions, *wrong, share]
