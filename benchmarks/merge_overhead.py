"""Does a merged model cost more than the sum of its modules timed alone?

    python benchmarks/merge_overhead.py [--device cuda] [--models deit_small_patch16_224,vit_base_patch16_224]
        [--cells 3,3 6,0 0,6 5,5] [--batches 1,64] [--seconds 20] [--fewest 7] [--compiled] [--out FILE]

The modules are timm's own and torch's, built anew: as many patch embeddings, norms, attentions, MLPs, merged linear
layers, residual additions and classifiers as the merged model has, each kind in a row of distinct modules, so that
weights come from memory as they do in the model. In every round the dense model, the merged one and each kind are timed
once, one after the other, with the device synchronised around each; `over` is the merged model's time over the sum, the
median over rounds with its 95 % interval. The goal is at most 1.03. Beside it: the speedup, what the MACs alone would
give, and with --compiled the speedup of both compiled. float32 on CPUs, weights and images in bfloat16 elsewhere. With
one thread on a CPU seconds are CPU time (`trainables.timing.clock_of`).
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from search_spaces import family_of
from search_spaces.plan import PruningPlan, Unit
from search_spaces.timm_compat import timm
from trainables.devices import DEVICES, describe, torch_device
from trainables.intervals import median_interval
from trainables.timing import FEWEST, calls_within, clock_of, count_macs, merged_without
from trainables.workspace import versions

MODELS = "deit_small_patch16_224,vit_base_patch16_224"
CELLS = ("3,3", "6,0", "0,6", "5,5")
GOAL = 1.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(DEVICES))
    parser.add_argument("--models", default=MODELS, help="timm names, separated by commas")
    parser.add_argument("--cells", nargs="+", default=CELLS, help="attentions,activations removed")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each model, cell and batch size")
    parser.add_argument("--fewest", type=int, default=FEWEST, help="rounds to take though they take longer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="time dense and merged compiled too")
    parser.add_argument("--out", type=Path, default=None, help="left out: results/merge_overhead-HARDWARE-TORCH.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch_device(args.device)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    rows, out = [], args.out or result_file("merge_overhead", device)
    for row in overheads(
        args.models.split(","), [cell_of(text) for text in args.cells], [int(b) for b in args.batches.split(",")],
        device, args.seconds, args.fewest, args.compiled,
    ):  # fmt: skip
        print(line_of(row), flush=True)
        rows.append(row)
        # After every row: a whole measurement takes an hour on a slow core.
        write_result(out, device, {"settings": settings, "goal": GOAL, "rows": rows})
    print(f"largest over: {max(row['over'] for row in rows):.3f} (goal: at most {GOAL}); written to {out}")


def cell_of(text: str) -> tuple[int, int]:
    n_attn, n_act = text.split(",")
    return int(n_attn), int(n_act)


def overheads(
    names: list[str],
    cells: list[tuple[int, int]],
    batches: list[int],
    device: torch.device,
    seconds: float,
    fewest: int,
    compiled: bool,
) -> Any:
    """Yield one measurement per model, cell and batch size."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for name in names:
        dense = timm.create_model(name).eval()
        size = tuple(timm.data.resolve_model_data_config(dense)["input_size"])
        for cell in cells:
            merged = merged_without(dense, PruningPlan.of(spread_units(dense, cell)), "zero")
            macs = count_macs(dense, size) / count_macs(merged, size)
            pair = [model.to(device, dtype) for model in (timm.create_model(name).eval(), merged)]
            modules = parts(name, cell, device, dtype)
            for batch in batches:
                pixels = torch.randn(batch, *size, device=device, dtype=dtype)
                row = {"model": name, "cell": list(cell), "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
                row |= {**measured(pair, modules, pixels, seconds, fewest), "macs_ratio": macs}
                if compiled:
                    row["speedup_compiled"] = compiled_speedup(pair, pixels, seconds, fewest)
                yield row


def spread_units(dense: nn.Module, cell: tuple[int, int]) -> list[Unit]:
    """Return units of a cell, evenly over the blocks: attentions from the front, activations from the back."""
    units = {kind: [u for u in family_of(dense).units(dense) if u.kind == kind] for kind in ("attn", "act")}
    attn, act = units["attn"], units["act"][::-1]
    return [
        *(attn[i * len(attn) // cell[0]] for i in range(cell[0])),
        *(act[i * len(act) // cell[1]] for i in range(cell[1])),
    ]


Make = Callable[[torch.Tensor], Callable[[], object]]


def parts(name: str, cell: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    """Return the modules of a merged model by kind, each of which makes a call from one batch of pixels."""
    fresh = timm.create_model(name).eval().to(device, dtype)
    blocks, width = fresh.blocks, fresh.embed_dim
    n_attn, n_mlp = len(blocks) - cell[0], len(blocks) - cell[1]
    linears = nn.ModuleList(nn.Linear(width, width) for _ in range(cell[1])).to(device, dtype)

    def tokens_of(pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return fresh._pos_embed(fresh.patch_embed(pixels)).clone()

    def on_tokens(modules: list[nn.Module]) -> Make:
        return lambda pixels: partial(each, modules, tokens_of(pixels))

    return {
        "embedding": lambda pixels: lambda: fresh._pos_embed(fresh.patch_embed(pixels)),
        "norms": on_tokens([*(b.norm1 for b in blocks[:n_attn]), *(b.norm2 for b in blocks), fresh.norm]),
        "attentions": on_tokens([block.attn for block in blocks[:n_attn]]),
        "mlps": on_tokens([block.mlp for block in blocks[:n_mlp]]),
        "linears": on_tokens(list(linears)),
        "additions": lambda pixels: partial(additions, tokens_of(pixels), n_attn + len(blocks)),
        "classifier": lambda pixels: partial(fresh.forward_head, tokens_of(pixels)),
    }


def each(modules: list[nn.Module], tokens: torch.Tensor) -> None:
    for module in modules:
        module(tokens)


def additions(tokens: torch.Tensor, count: int) -> None:
    total = tokens
    for _ in range(count):
        total = total + tokens


def measured(
    pair: list[nn.Module], modules: dict[str, Make], pixels: torch.Tensor, seconds: float, fewest: int
) -> dict[str, Any]:
    """Time dense, merged and the kinds of modules in turn."""
    calls = [*(partial(model, pixels) for model in pair), *(make(pixels) for make in modules.values())]
    found = calls_within(seconds, calls, pixels.device, fewest=fewest, amp=False)
    over = median_interval(list(found[:, 1] / found[:, 2:].sum(axis=1)))
    speedup = median_interval(list(found[:, 0] / found[:, 1]))
    names = ("dense", "merged", *modules)
    return {
        "rounds": len(found),
        **dict(zip(("over", "over_low", "over_high"), over, strict=True)),
        **dict(zip(("speedup", "speedup_low", "speedup_high"), speedup, strict=True)),
        "seconds": dict(zip(names, map(float, np.median(found, axis=0)), strict=True)),
    }


def compiled_speedup(pair: list[nn.Module], pixels: torch.Tensor, seconds: float, fewest: int) -> float:
    torch.compiler.reset()
    calls = [partial(torch.compile(model, dynamic=False), pixels) for model in pair]
    found = calls_within(seconds, calls, pixels.device, fewest=fewest, amp=False)
    return median_interval(list(found[:, 0] / found[:, 1]))[0]


def line_of(row: dict[str, Any]) -> str:
    compiled = f", compiled {row['speedup_compiled']:.2f}x" if "speedup_compiled" in row else ""
    return (
        f"{row['model']} ({row['cell'][0]},{row['cell'][1]}) batch {row['batch']}: over the sum of its modules "
        f"{row['over']:.3f} ({row['over_low']:.3f} to {row['over_high']:.3f}); speedup {row['speedup']:.2f}x eager"
        f"{compiled}, ratio of MACs {row['macs_ratio']:.2f}x"
    )


def result_file(what: str, device: torch.device) -> Path:
    """Return a place named by hardware and torch's version."""
    hardware = "-".join("".join(c if c.isalnum() else " " for c in describe(device)).split())
    version = torch.__version__.partition("+")[0]
    return Path(__file__).parent / "results" / f"{what}-{hardware}-torch{version}.json"


def write_result(out: Path, device: torch.device, found: dict[str, Any]) -> None:
    about = {
        "device": describe(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if clock_of(device) is time.thread_time else "wall",
        "load": os.getloadavg()[0],
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        **versions(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
