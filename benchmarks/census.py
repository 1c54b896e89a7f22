"""Which of timm's models are transformers of the kind that this method is about? Counted without knowing any family.

    python benchmarks/census.py --out benchmarks/results/census.csv

Every name of `timm.list_models()` is built on the meta device and run once; `structure.py` says what it is made of. A
model counts if it has at least 4 blocks that each hold a softmax attention and two `nn.Linear` with one activation
between. A model with fewer than 8 `nn.Linear` cannot, and is not run; nor is one of the same class, modules and
settings as one that was. What cannot be run on the meta device is run on the CPU. A row per name: a name that has one
already is not looked at again. About ten minutes of one core.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from structure import Structure, structure
from torch import nn
from torch.overrides import TorchFunctionMode

from search_spaces.timm_compat import timm

BLOCKS = 4
COLUMNS = (
    "name", "class", "parameters", "linear", "ran_on", "blocks", "block_class", "attentions", "attention_class",
    "other_attentions", "mlps", "mlp_class", "counts", "why_not",
)  # fmt: skip


class NoInitialisation(TorchFunctionMode):
    """Leaves parameters as they are allocated: on the meta device there is nothing to set, and it takes long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_place = getattr(func, "__name__", "").endswith("_") and not func.__name__.endswith("__")
        if in_place and args and isinstance(args[0], nn.Parameter) and "requires_grad" not in func.__name__:
            return args[0]
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/census.csv"))
    parser.add_argument("--names", nargs="*", help="Look at these only; left out: at all that timm has.")
    args = parser.parse_args()
    names = args.names or timm.list_models()
    done, known = read(args.out), dict[str, dict[str, Any]]()
    with args.out.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if not done:
            writer.writeheader()
        for name in names:
            if name not in done:
                done[name] = row = {"name": name, **look(name, known)}
                writer.writerow(row)
                stream.flush()
    rows = [done[name] for name in sorted(done)]
    write(args.out, rows, COLUMNS)
    for line in summary(rows):
        print(line)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a census by name; none where there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as stream:
        return {row["name"]: row for row in csv.DictReader(stream)}


def write(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write rows, in this order."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def build_on_meta(name: str) -> nn.Module:
    """Build a model without memory for its weights."""
    with torch.device("meta"), NoInitialisation():
        return timm.create_model(name, pretrained=False)


def look(name: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return all columns but the name; `known` has what was seen of models by their fingerprint."""
    try:
        model = build_on_meta(name)
    except Exception as error:  # whatever a model's own code raises
        return {"why_not": f"cannot be built: {_short(error)}", "counts": False}
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    row = {
        "class": type(model).__name__,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "linear": linear,
    }
    if linear < 2 * BLOCKS:
        return {**row, "counts": False, "why_not": f"{linear} nn.Linear"}
    digest = fingerprint(model)
    if digest not in known:
        try:
            seen, place = run_once(name, model)
            known[digest] = {"ran_on": place, **judged(model, seen)}
        except Exception as error:
            known[digest] = {"counts": False, "why_not": f"cannot be run: {_short(error)}"}
    return {**row, **known[digest]}


def fingerprint(model: nn.Module) -> str:
    """Return a digest of the classes, order and plain settings of all modules."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        digest.update(f"{name} {type(module)} {module.extra_repr()} {sorted(plain.items())}".encode())
    return digest.hexdigest()


def run_once(name: str, model: nn.Module) -> tuple[Structure, str]:
    """Return what was seen of a model built on the meta device, and where it was run."""
    size = model.pretrained_cfg["input_size"]
    try:
        return structure(model, torch.empty(1, *size, device="meta")), "meta"
    except Exception:  # the model looks at its numbers
        return structure(timm.create_model(name, pretrained=False), torch.rand(1, *size)), "cpu"


def judged(model: nn.Module, seen: Structure) -> dict[str, Any]:
    """Return the columns that say what was seen, and whether the model counts."""
    modules = dict(model.named_modules())
    blocks = repeated_blocks(modules, seen)
    mlps = [second.rpartition(".")[0] for _, second in seen.mlps]
    why = ""
    if len(blocks) < BLOCKS:
        few = f"{len(blocks)} blocks with both" if blocks else "no block with both"
        why = f"{few}: {len(seen.attentions)} softmax attentions, {len(mlps)} MLPs"
    return {
        "blocks": len(blocks),
        "block_class": _classes(modules, blocks),
        "attentions": len(seen.attentions),
        "attention_class": _classes(modules, seen.attentions),
        "other_attentions": _classes(modules, seen.others),
        "mlps": len(mlps),
        "mlp_class": _classes(modules, mlps),
        "counts": not why,
        "why_not": why,
    }


def repeated_blocks(modules: dict[str, nn.Module], seen: Structure) -> list[str]:
    """Return the blocks of classes that there are several of: a lone one is a head or a pooling."""
    blocks = seen.blocks()
    often = Counter(type(modules[name]) for name in blocks)
    return [name for name in blocks if often[type(modules[name])] > 1]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return how many names count, by class of the model."""
    counting = [row for row in rows if str(row["counts"]) == "True"]
    classes = Counter(row["class"] for row in counting)
    failed = [row["name"] for row in rows if row["why_not"].startswith("cannot")]
    return [
        f"{len(rows)} names, {len(counting)} count; {len(failed)} cannot be built or run {' '.join(failed)}".strip(),
        *(f"{count:5} {name}" for name, count in classes.most_common()),
    ]


def _classes(modules: dict[str, nn.Module], names: list[str]) -> str:
    return " ".join(sorted({type(modules[name]).__name__ for name in names}))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"


if __name__ == "__main__":
    main()
