"""Recipes: the presets of the long fine-tune, what came later than earlier runs, and what makes no sense."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from search_spaces.plan import Attention
from trainables.settings import Recipe


def adapt_recipe() -> Recipe:
    """Return how a dense model is adapted where nothing else is said: not at all."""
    return Recipe(epochs=0, lr=2e-3, warmup_epochs=0.5, clip_grad=1.0)


def finetune_recipe() -> Recipe:
    """Return how the winner is trained where nothing else is said: on small images, for few epochs."""
    return Recipe(epochs=10, lr=3e-3, warmup_epochs=0.5, ema=0.998, distillation="soft")


_STRONG = {
    "batch_size": 1024, "min_lr": 1e-5, "clip_grad": 0.0, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0,
    "drop_path": 0.1, "ema": 0.99996, "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25,
    "crop_scale": 0.08, "hflip": 0.5,
}  # fmt: skip
"""What the two published recipes share."""

PRESETS: dict[str, dict[str, Any]] = {
    # HetDPT ("Rethinking Depth Pruning for ViTs: A Heterogeneity-Aware Perspective", PMLR v306). What it leaves open is
    # as in DeiT, on whose code it builds.
    "hetdpt": {
        **_STRONG, "epochs": 400, "lr": 5e-5, "warmup_epochs": 10.0, "weight_decay": 0.08, "distillation": "hard",
        "distillation_alpha": 0.5,
    },
    # DeiT-B (Touvron et al. 2021, table 9).
    "deit": {
        **_STRONG, "epochs": 300, "lr": 5e-4, "warmup_epochs": 5.0, "weight_decay": 0.05, "distillation": "none",
        "repeated_augmentation": 3,
    },
    # A few epochs from good weights: little augmentation, and the dense model's probabilities to learn from.
    "short": {
        "epochs": 10, "batch_size": 256, "lr": 1e-4, "min_lr": 1e-6, "warmup_epochs": 0.5, "weight_decay": 0.05,
        "clip_grad": 1.0, "label_smoothing": 0.1, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "ema": 0.999,
        "distillation": "soft", "distillation_alpha": 0.5, "auto_augment": "", "random_erasing": 0.0,
        "crop_scale": 0.35, "hflip": 0.5,
    },
}  # fmt: skip
"""What each `--recipe` sets of the long fine-tune; the rest is as in a `Recipe`."""

LATER_IN_RECIPES = {
    "betas": [0.9, 0.999], "repeated_augmentation": 1, "micro_batch": 0, "compile": False,
    "recompute_activations": False,
}  # fmt: skip
"""Fields that earlier versions lacked, and what those versions did."""


def preset(name: str) -> dict[str, Any]:
    """Return all fields of the long fine-tune under a preset."""
    return asdict(Recipe(**PRESETS[name]))


def recipe_inputs(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe, without those that earlier versions lacked where they are what those did."""
    fields = asdict(recipe)
    return {name: value for name, value in fields.items() if LATER_IN_RECIPES.get(name, ...) != value}


def wrong_with(recipe: Recipe, workers: int, attention: Attention) -> str:
    """Return what makes no sense in a recipe for at most so many workers, as the end of a line; empty if nothing."""
    pairs = bool(recipe.mixup or recipe.cutmix)
    if pairs and recipe.batch_size % 2:
        return "batch_size must be even with mixup or cutmix"
    if recipe.batch_size < workers * (2 if pairs else 1):
        needed = f"{workers} workers" + (", each with pairs for mixup or cutmix" if pairs else "")
        return f"batch_size ({recipe.batch_size}) is too small for {needed}"
    if len(recipe.betas) != 2 or not all(0 <= beta < 1 for beta in recipe.betas):
        return f"betas is {recipe.betas}: give two numbers from 0 to below 1, such as [0.9,0.999]"
    if recipe.compile and attention == "double":
        return "compile cannot be had with --attention double, which changes the model at every step"
    return ""


def worker_range(text: int | str) -> tuple[int, int]:
    """Return the fewest and the most workers that a number or a range, such as 1..4, names.

    Raises:
        ValueError: it is neither.
    """
    first, dots, last = str(text).partition("..")
    digits = first.isdecimal() and (last.isdecimal() or not dots)
    fewest, most = (int(first), int(last or first)) if digits else (0, 0)
    if not 1 <= fewest <= most:
        raise ValueError(f"finetune_workers is {text!r}: give a number of at least 1, or a range such as 1..4")
    return fewest, most
