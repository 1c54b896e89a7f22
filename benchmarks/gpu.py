"""One command on one GPU: what merging and the fine-tune's loop cost over plain PyTorch and timm.

    python benchmarks/gpu.py                     # CUDA: DeiT-S and ViT-B; some ten minutes
    python benchmarks/gpu.py --small             # a minute on a CPU: to see that it works, not to be quoted

1. `merge_overhead.py`, eager and compiled.
2. Images per second of this package's training loop (`trainables.engine.Training`, as the long fine-tune runs it,
   without teacher and moving average) against a plain loop of timm's own parts (`create_loader` with its prefetcher
   where there is a GPU, `create_optimizer_v2`, `SoftTargetCrossEntropy`, clipping) on the same pruned model, images,
   augmentation, precision and number of loader processes. Epochs of the two alternate; the ratio is the median with
   its 95 % interval. The goal is at least 0.98.
The result file is named by hardware and version.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from merge_overhead import GOAL, cell_of, line_of, overheads, result_file, spread_units, write_result
from PIL import Image
from torch import nn

from search_spaces import family_of
from search_spaces.plan import PruningPlan
from search_spaces.timm_compat import timm
from trainables.data import ImageSet, View
from trainables.devices import DEVICES, autocast, synchronise, torch_device
from trainables.engine import Training
from trainables.intervals import median_interval
from trainables.settings import DataSettings, Recipe
from trainables.timing import FEWEST

LOOP_GOAL = 0.98
RECIPE = Recipe(epochs=1000, lr=1e-4, label_smoothing=0.1)
SMALL = {"models": "deit_tiny_patch16_224", "cells": ["3,3"], "batches": "1,4", "seconds": 3.0, "images": 48}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="on the CPU, with a small model and few images")
    parser.add_argument("--models", default="deit_small_patch16_224,vit_base_patch16_224")
    parser.add_argument("--cells", nargs="+", default=["3,3", "6,0", "0,6", "5,5"])
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each model, cell and batch size of part 1")
    parser.add_argument("--images", type=int, default=8192, help="images in an epoch of part 2")
    parser.add_argument("--batch-size", type=int, default=128, help="of part 2")
    parser.add_argument("--workers", type=int, default=8, help="loader processes of part 2")
    parser.add_argument("--epochs", type=int, default=6, help="of each loop in part 2, after one of warming up")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL, batch_size=8, workers=0, epochs=2)
    device = torch_device("cpu" if args.small else "cuda")
    rows = []
    for row in overheads(
        args.models.split(","), [cell_of(text) for text in args.cells], [int(b) for b in args.batches.split(",")],
        device, args.seconds, FEWEST, compiled=not args.small,
    ):  # fmt: skip
        print(line_of(row), flush=True)
        rows.append(row)
    loops = [loop(name, args, device) for name in args.models.split(",")]
    out = args.out or result_file("gpu-small" if args.small else "gpu", device)
    write_result(out, device, {"goals": {"over": GOAL, "loop": LOOP_GOAL}, "merge_overhead": rows, "training": loops})
    print(f"written to {out}")


def loop(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Alternate epochs of the two loops on one model without 5 attentions and 5 activations."""
    ours = OurLoop(name, args, device)
    plain = PlainLoop(name, args, device)
    rates = []
    for epoch in range(args.epochs + 1):
        # The order changes, so that neither always has the warmer machine.
        pair = {each: timed(each.epoch, device) for each in ((ours, plain) if epoch % 2 else (plain, ours))}
        rates.append((ours.images / pair[ours], plain.images / pair[plain]))
    kept = rates[1:]
    ratio, low, high = median_interval([a / b for a, b in kept])
    found = {
        "model": name,
        "batch_size": args.batch_size,
        "workers": args.workers,
        "images_per_second": statistics.median(a for a, _ in kept),
        "images_per_second_plain": statistics.median(b for _, b in kept),
        "ratio": ratio,
        "low": low,
        "high": high,
    }
    print(
        f"{name}: training {found['images_per_second']:,.1f} images/s, plain timm loop "
        f"{found['images_per_second_plain']:,.1f}, ratio {ratio:.3f} ({low:.3f} to {high:.3f}; "
        f"goal: at least {LOOP_GOAL})",
        flush=True,
    )
    return found


def timed(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def pruned(name: str) -> nn.Module:
    model = timm.create_model(name)
    plan = PruningPlan.of(spread_units(model, (5, 5)))
    return family_of(model).remove(model, plan, "zero")


def image_set(model: nn.Module, images: int) -> ImageSet:
    """Return random pictures as the cache of decoded images holds them."""
    view = View.of(model, DataSettings())
    side, rng = view.cache_side, np.random.default_rng(0)
    coarse = rng.integers(0, 256, (images, 16, 16, 3), dtype=np.uint8)
    pixels = np.stack([np.asarray(Image.fromarray(c).resize((side, side))) for c in coarse])
    return ImageSet(pixels, rng.integers(0, 1000, images), view)


class OurLoop:
    """The long fine-tune's loop."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device) -> None:
        model = pruned(name)
        recipe = Recipe(**{**vars(RECIPE), "batch_size": args.batch_size})
        self._training = Training(
            model, image_set(model, args.images), recipe, device=device, seed=0, workers=args.workers
        )
        self.images = args.images // args.batch_size * args.batch_size

    def epoch(self) -> None:
        self._training.run_epoch()


class Pictures(torch.utils.data.Dataset):
    """An image set as timm's loader wants a data set: it puts its transform here."""

    def __init__(self, images: ImageSet) -> None:
        self._images, self.transform = images, None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self._images.pixels[index])), int(self._images.labels[index])


class PlainLoop:
    """What one writes by hand with timm."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device) -> None:
        self._model, self._device = pruned(name).to(device), device
        images = image_set(self._model, args.images)
        view, self._prefetcher = images.view, device.type == "cuda"
        self._loader = timm.data.create_loader(
            Pictures(images), view.input_size, args.batch_size, is_training=True, use_prefetcher=self._prefetcher,
            scale=(RECIPE.crop_scale, 1.0), hflip=RECIPE.hflip, color_jitter=None, interpolation=view.interpolation,
            mean=view.mean, std=view.std, num_workers=args.workers, device=device, persistent_workers=False,
        )  # fmt: skip
        self._optimizer = timm.optim.create_optimizer_v2(
            self._model, opt="adamw", lr=RECIPE.lr, weight_decay=RECIPE.weight_decay, fused=DEVICES[device.type].fused
        )
        self._loss = importlib.import_module("timm.loss").SoftTargetCrossEntropy()
        self.images = args.images // args.batch_size * args.batch_size

    def epoch(self) -> None:
        self._model.train()
        for pixels, labels in self._loader:
            if not self._prefetcher:
                pixels, labels = pixels.to(self._device), labels.to(self._device)
            targets = timm.data.mixup.mixup_target(labels, 1000, smoothing=RECIPE.label_smoothing)
            with autocast(self._device, True):
                loss = self._loss(self._model(pixels), targets)
            self._optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self._model.parameters(), RECIPE.clip_grad)
            self._optimizer.step()


if __name__ == "__main__":
    main()
