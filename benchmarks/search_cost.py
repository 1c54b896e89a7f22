"""What a search costs beside the long fine-tune it is for, in the published setting.

    python benchmarks/search_cost.py benchmarks/results/compare/*.csv

Reads the curves that `dpt-search compare ... --out FOLDER` wrote. A trial of the published setting is 10 epochs on a
subset of 100,000 images, evaluated on ImageNet's 50,000 after every epoch and once before; training an image counts as
three forward passes. The fine-tune is 400 epochs on 1.28 million images; its teacher and its evaluations are left out,
which makes the search look dearer than it is. Published: 7 % for one budget.
"""

import argparse
import csv
from pathlib import Path

FORWARDS = 3
TRIAL = 10 * 100_000 * FORWARDS + 11 * 50_000
FINETUNE = 400 * 1_281_167 * FORWARDS
TARGET = 0.0015
"""Regret above the noise floor, in units of accuracy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="+", type=Path)
    parser.add_argument("--strategy", default="map")
    args = parser.parse_args()
    for path in args.curves:
        cost = cost_to(path, args.strategy)
        if cost is None:
            print(f"{path.stem}: {args.strategy} does not get to {TARGET:.2%}")
            continue
        print(f"{path.stem}: {cost:g} trials of the dense model, {cost * TRIAL / FINETUNE:.2%} of the fine-tune")


def cost_to(path: Path, strategy: str) -> float | None:
    """Return the least cost from which the strategy's regret stays at the target, in trials of the dense model."""
    with path.open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["strategy"] == strategy]
    over = [i for i, row in enumerate(rows) if not float(row["mean"]) <= TARGET]
    first = over[-1] + 1 if over else 0
    return float(rows[first]["cost"]) if first < len(rows) else None


if __name__ == "__main__":
    main()
