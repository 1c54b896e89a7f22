"""What of every model that timm has can be removed, tried out: the tables in docs/models.md.

    python benchmarks/model_sweep.py

Every name of the census is asked what it offers. Where it offers units, half of each kind, drawn at random, are removed
and merged: in a model with random weights where it has fewer than `--real-below` parameters, at 112 or 128 pixels a
side if it can be built for them, and what the model computes is compared step by step; else on the meta device, where
only shapes and parameters can be. Names that are the same model but for its weights are tried once. A row per name is
written as it is done; a name that has one already is not tried again (`--anew` begins from the start).
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from census import build_on_meta, fingerprint, read, write
from sweep_page import page, summary
from torch import nn

from search_spaces import Offer, UnsupportedModel, family_of, offered
from search_spaces.blocks import form_of
from search_spaces.plan import PruningPlan
from trainables.dense import BadModel, build_model
from trainables.settings import ModelSettings

COLUMNS = ("name", "class", "counts", "blocks", "verdict", "reason", "attn", "act", "tried", "difference")
RESULTS = Path("benchmarks/results")
TOLERANCE = 1e-4
"""Largest difference of two outputs in float32, over the largest output."""
LEAST = 10 * TOLERANCE
"""Smallest difference of dense and pruned model, likewise: less of it, and nothing would have been seen."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--census", type=Path, default=RESULTS / "census.csv")
    parser.add_argument("--out", type=Path, default=RESULTS / "models.csv")
    parser.add_argument("--page", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--real-below", type=float, default=30e6, help="Parameters (default: 30e6).")
    parser.add_argument("--ask-only", action="store_true", help="Try nothing, for a first look.")
    parser.add_argument("--names", nargs="*", help="Try these only.")
    parser.add_argument("--anew", action="store_true", help="Forget what was written before.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.anew:
        args.out.unlink(missing_ok=True)
    census, done, known = read(args.census), read(args.out), dict[str, dict[str, Any]]()
    with args.out.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if not done:
            writer.writeheader()
        # Those that count first: what a sweep that is cut short has is what matters.
        for name in args.names or sorted(census, key=lambda name: census[name]["counts"] != "True"):
            if name not in done and name in census:
                found = tried(census[name], -1.0 if args.ask_only else args.real_below, known)
                done[name] = row = {**dict.fromkeys(COLUMNS, ""), "name": name, **found}
                writer.writerow(row)
                stream.flush()
    rows = [done[name] for name in census if name in done]
    write(args.out, rows, COLUMNS)
    args.page.write_text(page(rows, census))
    for line in summary(rows):
        print(line)
    return int(any(row["verdict"] == "wrong" for row in rows))


def tried(counted: dict[str, Any], real_below: float, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return all columns but the name.

    Args:
        counted: the name's row of the census.
        real_below: models with fewer parameters are tried with weights; below 0, none is tried at all.
        known: what was found of models by their fingerprint; added to.
    """
    row = {"class": counted["class"], "counts": counted["counts"], "blocks": counted["blocks"]}
    if not counted["class"]:
        return {**row, "verdict": "refused", "reason": counted["why_not"]}
    model = build_on_meta(counted["name"])
    digest = fingerprint(model)
    if digest not in known:
        known[digest] = looked_at(counted, model, real_below)
    return {**row, **known[digest]}


def looked_at(counted: dict[str, Any], model: nn.Module, real_below: float) -> dict[str, Any]:
    """Return what a model built on the meta device offers, and whether it is so."""
    try:
        offer = offered(model)
    except UnsupportedModel as error:
        return {"verdict": "refused", "reason": str(error), "attn": 0, "act": 0}
    verdict, reason = judged(offer, int(counted["blocks"] or 0), not_described(model, counted["block_class"].split()))
    row = {"verdict": verdict, "reason": reason, "attn": len(offer.attn), "act": len(offer.act)}
    if real_below < 0 or not (offer.attn or offer.act):
        return row
    try:
        if int(counted["parameters"]) < real_below:
            model, where = with_weights(counted["name"])
        else:
            where = "meta"
        return {**row, "tried": where, "difference": difference(model, offer)}
    except Exception as error:  # whatever it is, it is a wrong answer
        said = (str(error).strip() or "no message").splitlines()[0][:200]
        return {**row, "verdict": "wrong", "reason": f"{type(error).__name__}: {said}"}


def not_described(model: nn.Module, classes: Sequence[str]) -> list[str]:
    """Return those classes of blocks, of all that the census names, that no family describes."""
    known = {type(module).__name__ for module in model.modules() if form_of(module) is not None}
    return [name for name in classes if name not in known]


def judged(offer: Offer, blocks: int, unknown: Sequence[str]) -> tuple[str, str]:
    """Return the verdict on an offer, and the reasons where it is not `supported`.

    Args:
        offer: what can be removed.
        blocks: number of blocks with a softmax attention and an MLP, as the census counts them.
        unknown: classes of such blocks that no family describes.
    """
    reasons = "; ".join(
        [*sorted(set(offer.refused.values())), *(f"{name}: no family describes it" for name in unknown)]
    )
    if not offer.attn and not offer.act:
        return "refused", reasons or "no attention and no MLP"
    if len(offer.attn) >= max(1, blocks) and len(offer.act) >= max(1, blocks):
        return "supported", ""
    lacking = reasons or f"{blocks} blocks, but {len(offer.attn)} attn and {len(offer.act)} act units"
    if not offer.act or not offer.attn:
        return ("attention only" if offer.attn else "activation only"), lacking
    return "partly", lacking


def with_weights(name: str) -> tuple[nn.Module, str]:
    """Return a model with random weights, none of them trivial, and what images it takes."""
    model: Any = build_model(ModelSettings(name))
    side = model.pretrained_cfg["input_size"][-1]
    small = 112 if side % 7 == 0 else 128
    if small < side:
        try:
            model = build_model(ModelSettings(name, {"img_size": small}))
        except BadModel:
            small = side
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            # Biases that are 0, norms that are 1, layer scales and heads that are next to nothing would hide mistakes.
            if weight.dim() <= 1:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
            elif weight.std() < 0.01:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model, f"{min(small, side)} px"


def difference(model: Any, offer: Offer) -> str:
    """Remove half of the units of each kind; return the largest relative difference, or nothing on the meta device.

    Raises:
        ValueError: gates at 0, what `remove` leaves and what `merge` makes of it do not compute the same, or nothing
            was removed.
    """
    draw, family = random.Random(0), family_of(model)
    attn, act = (draw.sample(some, (len(some) + 1) // 2) for some in (offer.attn, offer.act))
    plan = PruningPlan(tuple(sorted(attn)), tuple(sorted(act)))
    place = next(model.parameters()).device
    generator = None if place.type == "meta" else torch.Generator().manual_seed(0)
    image = torch.randn(1, *model.pretrained_cfg["input_size"], device=place, generator=generator)
    before = sum(weight.numel() for weight in model.parameters())
    with torch.no_grad():
        dense = model.eval()(image)
        with family.gates(model, "zero") as gates:
            for unit in plan.units:
                gates[unit].zero_()
            gated = dense if place.type == "meta" else model(image)
        family.remove(model, plan, "zero")
        removed = dense if place.type == "meta" else model(image)
        merged = family.merge(model)(image)
    if sum(weight.numel() for weight in model.parameters()) >= before:
        raise ValueError(f"{plan} leaves as many parameters as before")
    if merged.shape != dense.shape:
        raise ValueError(f"the output's shape was {tuple(dense.shape)}, and is {tuple(merged.shape)} without {plan}")
    return "" if place.type == "meta" else _compared(dense, gated, removed, merged)


def _compared(dense: torch.Tensor, gated: torch.Tensor, removed: torch.Tensor, merged: torch.Tensor) -> str:
    largest = removed.abs().max()
    apart = {"gates": gated - removed, "merge": merged - removed}
    worst = {name: float(by.abs().max() / largest) for name, by in apart.items()}
    for name, by in worst.items():
        if not by <= TOLERANCE:
            raise ValueError(f"{name}: the output differs by {by:.1e} of its largest value")
    if not float((dense - removed).abs().max() / largest) > LEAST:
        raise ValueError("the output is hardly other than the dense model's: nothing was compared")
    return f"{max(worst.values()):.1e}"


if __name__ == "__main__":
    sys.exit(main())
