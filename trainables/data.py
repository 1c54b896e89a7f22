"""Decoded images for training and evaluation: one node-local memory map that all trials share.

Shapes: N images, S pixels a side, C channels. The cache holds uint8 (N, S, S, C); a batch is float (B, C, H, W).
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from search_spaces.timm_compat import timm
from trainables.batches import Pieces, Share, epoch_order, grain, key_of, seed_augmentation
from trainables.locations import resolve
from trainables.settings import DataSettings, Recipe
from trainables.splits import Indices, assign, balanced_subset
from trainables.tables import BadData, Table, open_tables

Batch = tuple[torch.Tensor, torch.Tensor]
WHOLE = Share()


@dataclass(frozen=True)
class View:
    """How a model wants its images: what `timm.data` resolves from the model, with the user's own values over it."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    @classmethod
    def of(cls, model: torch.nn.Module, data: DataSettings) -> View:
        """Return the view of `model` on `data`.

        Raises:
            BadData: mean and std do not have one value per channel.
        """
        config = timm.data.resolve_model_data_config(model)
        channels, *size = config["input_size"]
        mean, std = tuple(data.mean or config["mean"]), tuple(data.std or config["std"])
        if len(mean) != channels or len(std) != channels:
            raise BadData(f"the model takes {channels} channels, so data.mean and data.std need {channels} values each")
        crop_pct = data.crop_pct or config.get("crop_pct") or 1.0
        return cls((channels, *size), mean, std, config["interpolation"], crop_pct)

    @property
    def cache_side(self) -> int:
        """Pixels a side of the images kept in the cache: what evaluation crops from."""
        return math.floor(max(self.input_size[1:]) / self.crop_pct)

    def transform(self, recipe: Recipe | None) -> Any:
        """Return timm's transform from PIL image to tensor: for training with `recipe`, for evaluation without."""
        common = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation, "crop_pct": self.crop_pct}
        if recipe is None:
            return timm.data.create_transform(self.input_size, **common)
        return timm.data.create_transform(
            self.input_size,
            is_training=True,
            scale=(recipe.crop_scale, 1.0),
            hflip=recipe.hflip,
            color_jitter=None,
            auto_augment=recipe.auto_augment or None,
            re_prob=recipe.random_erasing,
            re_mode="pixel" if recipe.random_erasing else "const",
            **common,
        )


class Pixels(Protocol):
    """Images by their number, each uint8 of shape (S, S, C), and some of them by a slice."""

    def __getitem__(self, key: Any, /) -> Any: ...


@dataclass(frozen=True)
class StreamedPixels:
    """Images that are decoded when they are asked for, to exactly what the cache would hold."""

    table: Table
    indices: Indices
    view: View

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return StreamedPixels(self.table, self.indices[key], self.view)
        return _square(self.table.image(int(self.indices[key])), self.view)


@dataclass(frozen=True)
class ImageSet:
    """The images of one split, or of a subset of it.

    Attributes:
        pixels: uint8, shape (N, S, S, C): the cache, a read-only memory map; or what decodes them one by one.
        labels: shape (N,).
        view: how the model wants them.
    """

    pixels: Pixels
    labels: Indices
    view: View

    def __len__(self) -> int:
        return len(self.labels)

    def train_batches(
        self, recipe: Recipe, seed: int, epoch: int, *, share: Share = WHOLE, workers: int = 0
    ) -> Iterator[Batch]:
        """Iterate over a worker's pieces of the batches of an epoch, augmented by (seed, epoch, image, repeat)."""
        order = epoch_order(len(self), recipe, seed, epoch)
        pieces = Pieces(order, share.of(recipe.batch_size, grain(recipe)))
        dataset = _Augmented(self, recipe, seed, epoch)
        return iter(DataLoader(dataset, batch_sampler=pieces, num_workers=workers))

    def eval_batches(self, batch_size: int = 256, workers: int = 0) -> Iterator[Batch]:
        """Iterate over all images in order."""
        return iter(DataLoader(_Transformed(self, self.view.transform(None)), batch_size, num_workers=workers))

    def picture(self, index: int) -> Image.Image:
        """Return one decoded image."""
        pixels = self.pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


class _Transformed(Dataset[tuple[torch.Tensor, int]]):
    """An image set seen through a transform."""

    def __init__(self, images: ImageSet, transform: Any) -> None:
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(self._images.picture(index)), int(self._images.labels[index])


class _Augmented(Dataset[tuple[torch.Tensor, int]]):
    """An image set seen through a random transform; what is random follows from the seed, the epoch and the image."""

    def __init__(self, images: ImageSet, recipe: Recipe, seed: int, epoch: int) -> None:
        self._images, self._recipe, self._key = images, recipe, (seed, epoch)
        self._transform = images.view.transform(recipe)

    def __getitem__(self, drawn: list[int]) -> tuple[torch.Tensor, int]:
        index, repeat = drawn
        seed_augmentation(key_of(*self._key, index, repeat), self._recipe)
        return self._transform(self._images.picture(index)), int(self._images.labels[index])


def load_images(
    data: DataSettings,
    split: str,
    view: View,
    seed: int,
    *,
    limit: int = 0,
    may_read_test: bool = False,
    streams: Callable[[bool], bool] | None = None,
) -> ImageSet:
    """Return the images of a split, building the node's cache of decoded ones when it is not there yet.

    Args:
        data: where the images are.
        split: one of `SPLITS`.
        view: the model's view.
        seed: seed of the splits and of a subset.
        limit: class-balanced subset of this many images; 0 means all.
        may_read_test: said by export, bench and report alone.
        streams: where there need be no cache (see `DataSettings.stream`): given whether this process would stream,
            returns whether all do that train together; `bool` where it trains alone.

    Raises:
        BadData: the data cannot be used.
        PermissionError: `test` was asked for by another reader.
    """
    if split == "test" and not may_read_test:
        raise PermissionError("only export, bench and report read the test split")
    table, indices = _select(open_tables(data), split, seed)
    if limit:
        indices = indices[balanced_subset(table.labels[indices], limit, seed)]
    path, shape = _cache_of(table, indices, view, Path(resolve(data.cache_dir)[1]))
    # Looked at before any of them builds: a cache that is half there leaves no room for itself.
    if streams and streams(data.stream == "always" or (data.stream == "auto" and not _fits(path, shape))):
        return ImageSet(StreamedPixels(table, indices, view), table.labels[indices], view)
    return ImageSet(_cached_pixels(table, indices, view, shape, path), table.labels[indices], view)


def carved_splits(data: DataSettings) -> list[str]:
    """Return the splits that the data lacks, which are therefore taken from its training part."""
    return [split for split in ("val", "test") if split not in open_tables(data)]


def split_sizes(data: DataSettings, seed: int) -> dict[str, int]:
    """Return how many images the splits of a search have, with none of them decoded.

    Args:
        data: where the images are.
        seed: of the splits.
    """
    tables = open_tables(data)
    sizes = {split: len(indices) for split, indices in assign(tables["train"].labels, frozenset(tables), seed).items()}
    for split in ("probe", "val"):
        if split in tables:
            sizes[split] = len(tables[split].labels)
    return {split: sizes[split] for split in ("train", "probe", "val")}


def _select(tables: dict[str, Table], split: str, seed: int) -> tuple[Table, Indices]:
    """Return the table that holds a split, and the split's rows in it."""
    if split != "train" and split in tables:
        return tables[split], np.arange(len(tables[split].labels))
    parts = assign(tables["train"].labels, frozenset(tables), seed)
    return tables["train"], parts[split]


def _cache_of(table: Table, indices: Indices, view: View, folder: Path) -> tuple[Path, tuple[int, ...]]:
    """Return where the decoded images are, or would be, and their shape; makes the folder."""
    shape = (len(indices), view.cache_side, view.cache_side, view.input_size[0])
    key = hashlib.sha256(repr((table.identity, shape, view.interpolation)).encode() + indices.tobytes())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key.hexdigest()[:32]}.npy", shape


def _fits(path: Path, shape: tuple[int, ...]) -> bool:
    return path.exists() or math.prod(shape) <= _room(path.parent)


def _room(folder: Path) -> float:
    """Return the bytes that a cache may take."""
    return 0.9 * shutil.disk_usage(folder).free


def _cached_pixels(table: Table, indices: Indices, view: View, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if not path.exists():
        with filelock.FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _build(table, indices, view, shape, path)
    return np.load(path, mmap_mode="r")


def _build(table: Table, indices: Indices, view: View, shape: tuple[int, ...], path: Path) -> None:
    """Decode into a temporary file, then rename: a cache is whole or not there."""
    size, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if size > _room(path.parent):
        raise BadData(
            f"decoded images need {size / 2**30:.1f} GiB and {path.parent} has {free / 2**30:.1f} GiB free: "
            "set data.cache_dir to a larger disk, or a smaller data.subset"
        )
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        pixels = np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape)
        for row, image in enumerate(table.images(indices)):
            pixels[row] = _square(image, view)
        pixels.flush()
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _square(image: Image.Image, view: View) -> np.ndarray:
    """Resize the shorter side to the cache's, and crop the centre; shape (S, S, C)."""
    side = view.cache_side
    image = image.convert("L" if view.input_size[0] == 1 else "RGB")
    if image.size != (side, side):
        scale = side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        resample = Image.Resampling.BILINEAR if view.interpolation == "bilinear" else Image.Resampling.BICUBIC
        image = image.resize((width, height), resample).crop((left, top, left + side, top + side))
    return np.asarray(image).reshape(side, side, -1)
