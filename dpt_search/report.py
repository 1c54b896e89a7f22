"""report.html: a run on one self-contained page, finished or not. Reads the run directory and nothing else."""

from __future__ import annotations

import base64
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from dpt_search.decisions import most_of
from dpt_search.evidence import Found, read_run, warnings
from dpt_search.pareto import label_of, pareto
from dpt_search.progress import duration
from dpt_search.store import Finished, RunStore, TrialLog
from search_spaces.budgets import Budget
from search_spaces.plan import PruningPlan, Ranking

if TYPE_CHECKING:
    from dpt_search.plots import Draw
    from dpt_search.tradeoff_plot import Tradeoff

STAGES = {
    "dense": "the check of the dense model",
    "profile": "the cost of every unit",
    "rank": "the ranking of the units",
    "search": "a finished trial",
    "recommend": "the recommendations",
    "finetune": "the long fine-tune",
    "baseline": "the same fine-tune of the dense model",
    "export": "the merged model, tested and timed",
}
"""What each stage leaves for the report, in order."""


def write_report(store: RunStore) -> str:
    """Write `report.html` and `plots/*.png`, from whatever the run holds.

    Returns:
        Where the page is.

    Raises:
        BadRun: the directory holds no run, or cannot be written to.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = read_run(store)
    # `autoescape` matters: error messages and paths come from outside.
    environment = Environment(
        loader=PackageLoader("dpt_search", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {f.__name__: f for f in (percent, points, date, counts, duration)}
    page = environment.get_template("report.html.jinja").render(
        found=found,
        headline=headline(found),
        missing=missing(found),
        warnings=warnings(found),
        plots={name: _plotted(store, name, draw, size) for name, (draw, size) in drawings(found).items()},
        trials=trial_rows(found.log),
        savings=savings(found),
        settings=list(_flat(found.run["config"], "")),
        longest=max((stamp["seconds"] for stamp in found.stages), default=0) or 1,
    )
    store.write("report.html", page.encode())
    return store.path("report.html")


def percent(value: float | None, digits: int = 1) -> str:
    """Write a fraction as per cent; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{digits}f}\u00a0%".replace("-", "−")


def points(value: float, digits: int = 1) -> str:
    """Write a difference of fractions in points, with its sign."""
    return f"{100 * value:+.{digits}f}".replace("-", "−")


def date(seconds: float) -> str:
    """Write a time since the epoch as a date, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def counts(plan: str) -> str:
    """Write how much a plan's text form removes."""
    removed = PruningPlan.parse(plan).cell
    attentions = f"{removed.n_attn} attention{'s' * (removed.n_attn != 1)}"
    return f"{attentions} and {removed.n_act} activation{'s' * (removed.n_act != 1)}"


def headline(found: Found) -> str:
    """Say in one line what came out: what was measured, or else what is predicted, or else that nothing is known."""
    if found.export is not None:
        timing, change = found.export["timing"], found.export.get("baseline", found.export)["difference"]
        batch = max(timing, key=int)
        lost, low, high = -change["mean"], -change["high"], -change["low"]
        word = "lost" if lost >= 0 else "gained"
        ends = sorted((low, high) if lost >= 0 else (-low, -high))
        interval = " to ".join(f"{100 * end:.1f}" for end in ends).replace("-", "−")
        same = " to the same training of the dense model" if "baseline" in found.export else ""
        accuracy = f"{abs(100 * lost):.1f} points {word}{same} (95\u00a0% interval {interval})"
        return f"{_speed(timing[batch]['speedup'], batch)}, {accuracy}"
    row = found.chosen
    speedup = row["speedup"] if row else {}
    speed = _speed(speedup[batch], batch) if (batch := max(speedup, key=int, default="")) else "speed unknown"
    if found.finetune is not None:
        return f"{percent(found.finetune['accuracy'])} on val after the long fine-tune, predicted: {speed}"
    if row is None:
        return "No result yet"
    return f"Predicted: {speed}, {percent(row['mean'])} on val after a short fine-tune"


def _speed(speedup: float, batch: str) -> str:
    return f"{speedup:.2f}x {'faster' if speedup >= 1 else 'the speed, so slower,'} at batch {batch}"


def missing(found: Found) -> list[tuple[str, str]]:
    """Return what the run does not hold yet and the command that makes it, in the order of the stages."""
    there = (
        found.dense, found.costs, found.ranking, found.finished, found.recommendation, found.finetune,
        found.baseline or not found.run["config"].get("baseline"), found.export,
    )  # fmt: skip
    where, left = shlex.quote(found.location), zip(STAGES.items(), there, strict=True)
    return [(what, f"dpt-search {name} {where}") for (name, what), value in left if not value]


def savings(found: Found) -> dict[str, tuple[float, float]]:
    """Return, by recommended plan, the share of the dense model's MACs and parameters that is left."""
    if found.costs is None:
        return {}
    dense, costs = (
        found.costs.dense,
        {row["plan"]: found.costs.of(PruningPlan.parse(row["plan"])) for row in found.rows},
    )
    return {plan: (cost.macs / dense.macs, cost.params / dense.params) for plan, cost in costs.items()}


def trial_rows(log: TrialLog) -> list[dict[str, Any]]:
    """Return one row for every trial that was proposed or ended, by number; cost is relative to the dearest trial."""
    dearest = max((record.cost for record in log.finished.values()), default=0.0) or 1.0
    rows = []
    for number in sorted({*log.proposed, *log.finished}):
        proposed, ended = log.proposed.get(number), log.finished.get(number)
        record = ended or Finished(number, proposed.plan if proposed else "dense", "", "unfinished")
        rows.append(
            {
                "record": record,
                "cell": str(PruningPlan.parse(record.plan).cell),
                "cost": record.cost / dearest,
                "seen": proposed.seen if proposed else None,
                "start": record.start or (proposed.start if proposed else ""),
            }
        )
    return rows


def drawings(found: Found) -> dict[str, tuple[Draw, tuple[float, float]]]:
    """Return every plot the run has the data for, with its size in inches."""
    from dpt_search import plots
    from dpt_search.tradeoff_plot import tradeoff

    dense = found.dense["accuracy"] if found.dense else None
    drawn: dict[str, tuple[Draw, tuple[float, float]]] = {}
    if found.recommendation:
        draw = partial(plots.surface, found=found.recommendation["surface"], trials=found.finished, rows=found.rows)
        drawn["surface"] = draw, (9.0, 4.8)
    batch, trials = speedups(found)
    if batch:
        drawn["tradeoff"] = partial(tradeoff, told=told_of(found, batch, trials)), (9.0, 4.8)
    if found.finished:
        drawn["recovery"] = partial(plots.recovery, trials=found.finished, dense=dense), (9.0, 4.4)
    if found.finetune and found.finetune["epochs"]:
        drawn["finetune"] = partial(plots.finetune, epochs=found.finetune["epochs"], dense=dense), (9.0, 3.2)
    if found.plan and found.ranking:
        ranking = Ranking(tuple(found.ranking["attn"]), tuple(found.ranking["act"]))
        blocks = partial(plots.plan, ranking=ranking, importance=found.ranking["importance"])
        drawn["plan"] = partial(blocks, removed=PruningPlan.parse(found.plan)), (9.0, 1.9)
    return drawn


def told_of(found: Found, batch: str, trials: list[tuple[float, float]]) -> Tradeoff:
    """Return what is drawn of accuracy against speedup at a batch size."""
    from dpt_search.tradeoff_plot import Tradeoff

    about, front, config = Budget(1.0, "speedup", int(batch)), [], found.run["config"]
    if found.recommendation and found.cell_costs is not None:
        most = most_of(found.cell_costs.ranking.space, config.get("max_attn"), config.get("max_act"))
        seen = Counter(PruningPlan.parse(trial.plan).cell for trial in found.finished)
        front = pareto(found.recommendation["surface"], found.cell_costs, about, most, seen)
    exported = (found.export["timing"][batch]["speedup"], found.export) if found.export else None
    rows = [(row["speedup"][batch], row) for row in found.rows]
    chosen = found.chosen["budget"] if found.chosen else ""
    assert found.costs is not None
    return Tradeoff(label_of(about, found.costs), rows, chosen, front, trials, found.dense, exported)


def speedups(found: Found) -> tuple[str, list[tuple[float, float]]]:
    """Return the batch size at which accuracy is drawn against speedup, and that pair for every finished trial.

    The batch is empty where no speed is known.
    """
    if found.costs is None or not (found.rows or found.export):
        return "", []
    known = [set(map(str, found.costs.dense.seconds)), *(set(row["speedup"]) for row in found.rows)]
    known += [set(found.export["timing"])] if found.export else []
    batch = max(set.intersection(*known), key=int, default="")
    if not batch:
        return "", []
    plans = [PruningPlan.parse(trial.plan) for trial in found.finished]
    faster = [found.costs.speedup(plan, int(batch)) for plan in plans]
    return batch, [(x, trial.accuracies[-1]) for x, trial in zip(faster, found.finished, strict=True)]


def _plotted(store: RunStore, name: str, draw: Draw, size: tuple[float, float]) -> dict[str, str]:
    """Write a plot's light form to the run directory and return both forms as data URIs."""
    from dpt_search.plots import png

    made = {paper: png(draw, size, paper) for paper in ("light", "dark")}
    store.write(f"plots/{name}.png", made["light"])
    return {paper: f"data:image/png;base64,{base64.b64encode(image).decode()}" for paper, image in made.items()}


def _flat(nested: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
