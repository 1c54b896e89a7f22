"""What does a step of the long fine-tune cost beside a plain PyTorch loop?

    OMP_NUM_THREADS=1 python benchmarks/finetune_step.py [--pairs 31] [--out benchmarks/results/finetune_step.json]

The embedded model, images and long fine-tune (soft distillation, moving average, clipped gradients), and a ViT-Tiny on
random images of 224 x 224 with mixup, cutmix, RandAugment and random erasing. The plain loop does the same work as one
would write it by hand: a shuffling loader over the same decoded images and transforms, AdamW, a cosine, the same
losses. What it lacks is what makes ours the same for any number of workers: randomness keyed by image, parts of a
batch, a weighted loss. Both take turns, a few steps each and each one first every other time; CPU seconds of one
thread, or wall clock on an accelerator. Ratio of a pair: ours over plain; the median of all, with its 95 % interval
from order statistics.
"""

import argparse
import itertools
import json
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dpt_search.options import read_config
from search_spaces.plan import PruningPlan
from search_spaces.timm_compat import timm
from trainables.data import ImageSet
from trainables.devices import autocast, synchronise
from trainables.engine import Training
from trainables.intervals import median_interval
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.tasks import Task
from trainables.workspace import Workspace, versions

OUT = Path(__file__).parent / "results" / "finetune_step.json"
GOAL = 1.05
CLASSES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="finetune_step_") as scratch:
        cases = {"embedded": (embedded(scratch, args.device), 6), "vit_tiny 224": (large(args.device), 3)}
        found = {}
        for name, (case, steps) in cases.items():
            row = found[name] = measure(*case, args.pairs, steps)
            print(
                f"{name}: {row['ours_seconds'] * 1e3:.1f} ms a step, plain {row['plain_seconds'] * 1e3:.1f} ms; ratio "
                f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}), goal at most {GOAL}: "
                f"{'met' if row['high'] <= GOAL else 'not met'}",
                flush=True,
            )
    about = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": 1, "device": args.device, **versions()}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"about": about, "goal": GOAL, "cases": found}, indent=1) + "\n")


def embedded(scratch: str, device: str) -> tuple[Workspace, ImageSet, Recipe]:
    config = read_config("run", [])
    data = replace(config.data, cache_dir=scratch)
    workspace = Workspace(Task(config.model, data, seed=0, device=device, threads=1, attention="zero"))
    return workspace, workspace.images("train", 1024), config.finetune


def large(device: str) -> tuple[Workspace, ImageSet, Recipe]:
    model = ModelSettings("vit_tiny_patch16_224", {"num_classes": CLASSES})
    workspace = Workspace(Task(model, DataSettings(), seed=0, device=device, threads=1, attention="zero"))
    rng, side = np.random.default_rng(0), workspace.view.cache_side
    coarse = rng.integers(0, 256, (64, 16, 16, 3), np.uint8)
    resized = [np.asarray(Image.fromarray(pixels).resize((side, side))) for pixels in coarse]
    recipe = Recipe(
        batch_size=8, lr=1e-3, clip_grad=0.0, mixup=0.8, cutmix=1.0, random_erasing=0.25,
        auto_augment="rand-m9-mstd0.5-inc1",
    )  # fmt: skip
    return workspace, ImageSet(np.stack(resized), rng.integers(0, CLASSES, 64), workspace.view), recipe


def measure(workspace: Workspace, images: ImageSet, recipe: Recipe, pairs: int, steps: int) -> dict[str, float]:
    few = ImageSet(images.pixels[: steps * recipe.batch_size], images.labels[: steps * recipe.batch_size], images.view)
    recipe = replace(recipe, epochs=pairs + 2)
    teacher = workspace.dense if recipe.distillation != "none" else None
    training = Training(workspace.pruned(PruningPlan()), few, recipe, device=workspace.device, seed=0, teacher=teacher)
    plain = plain_epochs(workspace, few, recipe)
    timed(workspace, training.run_epoch), timed(workspace, lambda: next(plain))
    ours, theirs = [], []
    for pair in range(pairs):
        both = [(ours, training.run_epoch), (theirs, lambda: next(plain))]
        for seconds, epoch in both if pair % 2 else both[::-1]:
            seconds.append(timed(workspace, epoch) / steps)
    ratio, low, high = median_interval([a / b for a, b in zip(ours, theirs, strict=True)])
    return {
        "batch_size": recipe.batch_size, "steps": steps, "pairs": pairs, "ratio": ratio, "low": low, "high": high,
        "ours_seconds": float(np.median(ours)), "plain_seconds": float(np.median(theirs)),
    }  # fmt: skip


def timed(workspace: Workspace, epoch: Callable[[], object]) -> float:
    clock = time.process_time if workspace.device.type == "cpu" else time.perf_counter
    synchronise(workspace.device)
    start = clock()
    epoch()
    synchronise(workspace.device)
    return clock() - start


class Plain(Dataset[tuple[torch.Tensor, int]]):
    """The decoded images, transformed."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = self.images.pixels[index]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return self.transform(image), int(self.images.labels[index])


def plain_epochs(workspace: Workspace, images: ImageSet, recipe: Recipe):
    """Train an epoch whenever the next one is asked for, as one would write it by hand."""
    device, model = workspace.device, workspace.pruned(PruningPlan()).to(workspace.device).train()
    loader = DataLoader(Plain(images, images.view.transform(recipe)), recipe.batch_size, shuffle=True, drop_last=True)
    lr, total = recipe.lr * recipe.batch_size / 512, recipe.epochs * len(loader)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=device.type in ("cpu", "cuda"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (1 + math.cos(math.pi * n / total)) / 2)
    average = timm.utils.ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
    teacher = workspace.dense.to(device).eval() if recipe.distillation != "none" else None
    classes, smoothing = model.num_classes, recipe.label_smoothing
    mixup = timm.data.Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=classes)
    for _ in itertools.count():
        for pixels, labels in loader:
            pixels, labels = pixels.to(device), labels.to(device)
            targets = F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
            if recipe.mixup:
                pixels, targets = mixup(pixels, labels)
            with autocast(device, recipe.amp):
                logits = model(pixels).float()
                loss = F.cross_entropy(logits, targets)
                if teacher is not None:
                    with torch.no_grad():
                        taught = F.log_softmax(teacher(pixels).float() / recipe.temperature, 1)
                    student = F.log_softmax(logits / recipe.temperature, 1)
                    soft = F.kl_div(student, taught, reduction="batchmean", log_target=True) * recipe.temperature**2
                    loss = (1 - recipe.distillation_alpha) * loss + recipe.distillation_alpha * soft
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_grad:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            scheduler.step()
            if average is not None:
                average.update(model)
        yield


def cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
