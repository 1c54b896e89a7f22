"""`dpt-search bench`: what its arguments name, and the table of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpt_search.config import BadConfig
from dpt_search.options import recorded_config
from dpt_search.remote import call_here
from dpt_search.run import Run
from dpt_search.store import BadRun, RunStore
from dpt_search.summary import text_table
from search_spaces import BadInput
from trainables.devices import DeviceName
from trainables.locations import exists
from trainables.settings import ModelSettings
from trainables.tasks import FORMATS, BenchModel, BenchTask

KINDS = "a run directory, an export/ folder, a .pt2 or .onnx file, dense:RUN or timm:NAME"


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        models: as written on the command line.
        batches: batch sizes.
        device: row of `devices.DEVICES`.
        threads: CPU threads.
        seconds: time to spend on each batch size.
        compiled: compile the models first.
    """

    models: Sequence[str]
    batches: tuple[int, ...]
    device: DeviceName
    threads: int
    seconds: float
    compiled: bool


def parse(text: str) -> BenchModel:
    """Return what a model on the command line is.

    Args:
        text: a run directory (its export), an `export/` folder, a `.pt2` or `.onnx` file, `dense:RUN` or `timm:NAME`;
            places are paths or URIs.

    Raises:
        BadInput: there is no such thing.
    """
    kind, _, rest = text.partition(":")
    if kind == "timm":
        return BenchModel(text, model=ModelSettings(rest))
    if kind == "dense":
        config = recorded_config(rest)
        return BenchModel(text, model=Run(config, RunStore(rest), lambda _: None).model, data=config.data)
    store = RunStore(text)
    if text.endswith((".pt2", ".onnx")):
        if not exists(text):
            raise BadInput(f"{text!r} does not exist")
        return BenchModel(text, store.path("").rstrip("/"))
    if store.exists("plan.json") and store.exists(FORMATS["safetensors"]):
        return BenchModel(text, store.path("").rstrip("/"))
    if store.exists("run.json"):
        if not store.exists("export/plan.json"):
            raise BadRun(f"nothing exported in {text!r} yet: run `dpt-search export` on it first")
        return BenchModel(text, store.path("export"))
    raise BadInput(f"cannot time {text!r}: name {KINDS}")


def measure(request: Request, say: Callable[[str], None]) -> str:
    """Time the models in a process of this machine; return the table.

    Ray is not started: its processes would take time from what is measured.

    Raises:
        BadInput: something asked for is not there or makes no sense.
    """
    if any(batch < 1 for batch in request.batches) or request.threads < 1 or not request.seconds > 0:
        raise BadConfig("batch sizes and --threads must be at least 1, and --seconds more than 0")
    task = BenchTask(
        tuple(parse(text) for text in request.models), request.device, request.threads, request.batches,
        request.seconds, request.compiled,
    )  # fmt: skip
    say(f"timing {len(task.models)} models, about {request.seconds:.0f} s for each batch size")
    return table(call_here("trainables.bench:bench", task), request.compiled)


def table(found: dict[str, Any], compiled: bool) -> str:
    """Lay out what `trainables.bench.bench` found; `times as fast` is against the first model."""
    rows = []
    for row in found["rows"]:
        size = "x".join(map(str, row["input_size"]))
        ratio = f"{row['ratio']:.2f}x ({row['low']:.2f} to {row['high']:.2f})"
        milliseconds = f"{1000 * row['seconds']:.2f} ± {500 * row['spread']:.2f}"
        per_second = f"{row['batch'] / row['seconds']:,.0f}"
        rows.append((str(row["batch"]), row["name"], size, per_second, milliseconds, ratio))
    header = ("batch", "model", "image", "images/s", "ms a batch", "times as fast")
    how = "compiled, but for ONNX" if compiled else "not compiled"
    about = f"{found['device']}, {found['threads']} threads, {found['dtype']}, {how}"
    return (
        f"{about}\n\n{text_table(header, rows)}\n\nInterleaved in one process; ms: median ± half the interquartile "
        "range; ratios: median over rounds (95 % interval).\nSpeed only: accuracy is in each run's export/summary.json."
    )
