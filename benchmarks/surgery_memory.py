"""Memory of the surgery: does removing and merging units hold a second copy of the model?

    python benchmarks/surgery_memory.py --model vit_large_patch16_224

Builds the model with random weights, then installs gates, removes every second unit of each kind and merges, and tells
the process's peak of resident memory before and after, beside the size of the weights. A second copy would add that
size. One core, no images.
"""

from __future__ import annotations

import argparse
import json
import resource

import torch

from search_spaces import family_of
from search_spaces.plan import PruningPlan
from search_spaces.timm_compat import timm


def measure(name: str, kwargs: dict[str, object]) -> dict[str, float]:
    """Return MiB of the weights, of the peak before the surgery, and by how much the surgery raised it."""
    model = timm.create_model(name, **kwargs).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    family = family_of(model)
    units = family.units(model)
    before = peak()
    with family.gates(model, "zero"):
        pass
    family.merge(family.remove(model, PruningPlan.of(unit for unit in units if unit.index % 2), "zero"))
    return {"weights_mib": weights / 2**20, "peak_before_mib": before, "added_mib": peak() - before}


def peak() -> float:
    """Return the process's peak of resident memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--kwargs", default="{}", help="further arguments of timm.create_model, JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"model": args.model, **measure(args.model, json.loads(args.kwargs))}))


if __name__ == "__main__":
    main()
