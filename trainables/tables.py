"""Image tables: labels at once, images one by one, from Parquet, folders, torchvision or a function of the user's."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from pyarrow import fs

from search_spaces import BadInput, first_line
from trainables.locations import IMAGE_SUFFIXES, resolve
from trainables.settings import NAMED_DATA, DataSettings
from trainables.splits import Indices

_SPLIT_NAMES = {"train": "train", "training": "train", "probe": "probe", "val": "val", "valid": "val",
                "validation": "val", "test": "test"}  # fmt: skip


class BadData(BadInput):
    """The images or labels cannot be used; the message says what to do."""


class Table(ABC):
    """Labelled images in a fixed order.

    Attributes:
        labels: class of every image, shape (images,).
        identity: text that changes when the content may have changed.
    """

    labels: Indices
    identity: str

    @abstractmethod
    def images(self, indices: Indices) -> Iterator[Image.Image]:
        """Yield the images at sorted indices, holding few of them at a time.

        Raises:
            BadData: an image cannot be decoded.
        """

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Return one image, holding no others but its neighbours in a Parquet file's row group.

        Raises:
            BadData: it cannot be decoded.
        """


def open_tables(data: DataSettings) -> dict[str, Table]:
    """Open what the user's data has, by split name; `train` is always there.

    Raises:
        BadData: nothing usable is at the path.
    """
    tables = _open(data)
    if "train" not in tables:
        raise BadData(f"no training images in {data.path or data.factory!r}: name a file or folder 'train…'")
    if "test" not in tables and "val" in tables:
        # The figure people know for such data (ImageNet, say) is the one on its only held-out part.
        tables["test"] = tables.pop("val")
    for split, table in tables.items():
        if not len(table.labels):
            raise BadData(f"no rows in the {split} split of {data.path or data.factory!r}")
    return tables


def _open(data: DataSettings) -> dict[str, Table]:
    if data.factory:
        return _open_factory(data.factory)
    if data.path in NAMED_DATA:
        return _open_torchvision(data)
    filesystem, path = resolve(data.path)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise BadData(
            f"data.path {data.path!r} does not exist: give a Parquet file or folder, an image folder, "
            f"or one of {', '.join(NAMED_DATA)}"
        )
    if info.type == fs.FileType.File:
        return {"train": ParquetTable(filesystem, [info], data)}
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    files = sorted((f for f in found if f.type == fs.FileType.File), key=lambda f: f.path)
    parquet = [f for f in files if f.path.endswith(".parquet")]
    tables = _by_split(parquet, path)
    if tables:
        return {split: ParquetTable(filesystem, group, data) for split, group in tables.items()}
    images = [f for f in files if f.path.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise BadData(f"data.path {data.path!r} has neither .parquet files nor images in class folders")
    groups = _by_split(images, path)
    classes = sorted({_class_of(file) for file in groups.get("train", images)})
    return {split: FolderTable(filesystem, group, classes) for split, group in groups.items()}


def _by_split(files: Sequence[fs.FileInfo], root: str) -> dict[str, list[fs.FileInfo]]:
    """Group files by the split that their own name, or a folder below `root`, starts with; all to train otherwise."""
    groups: dict[str, list[fs.FileInfo]] = {}
    for file in files:
        parts = PurePosixPath(file.path).relative_to(root).parts
        names = [part.split(".")[0].split("-")[0].split("_")[0].lower() for part in parts]
        named = [_SPLIT_NAMES[name] for name in names if name in _SPLIT_NAMES]
        groups.setdefault(named[0] if named else "train", []).append(file)
    return groups


class ParquetTable(Table):
    """Rows of Parquet files in the Hugging Face image layout: a struct with `bytes`, or bytes, and an integer."""

    def __init__(self, filesystem: fs.FileSystem, files: Sequence[fs.FileInfo], data: DataSettings) -> None:
        self._filesystem, self._files, self._data = filesystem, files, data
        self._open: dict[tuple[int, str], tuple[pq.ParquetFile, Indices]] = {}
        self.identity = " ".join([data.image_column, *(f"{f.path}:{f.size}:{f.mtime_ns}" for f in files)])
        labels = [self._read_labels(file.path) for file in files]
        self._starts = np.cumsum([0, *map(len, labels)])
        self.labels = np.concatenate(labels)

    def _read_labels(self, path: str) -> Indices:
        try:
            names = pq.read_schema(path, filesystem=self._filesystem).names
            for column in (self._data.image_column, self._data.label_column):
                if column not in names:
                    raise BadData(f"{path} has no column {column!r} (it has {', '.join(names)}): set data.image_column "
                                  "and data.label_column")  # fmt: skip
            table = pq.read_table(path, columns=[self._data.label_column], filesystem=self._filesystem)
            return table.column(0).to_numpy().astype(np.int64, casting="safe")
        except (pa.ArrowException, OSError, TypeError) as error:
            raise BadData(f"cannot read {path} as Parquet with integer labels: {first_line(error)}") from None

    def images(self, indices: Indices) -> Iterator[Image.Image]:
        for file, first, last in zip(self._files, self._starts[:-1], self._starts[1:], strict=True):
            wanted = indices[(indices >= first) & (indices < last)] - first
            if len(wanted):
                yield from self._images_of(file.path, wanted)

    def _images_of(self, path: str, wanted: Indices) -> Iterator[Image.Image]:
        start = 0
        try:
            with pq.ParquetFile(path, filesystem=self._filesystem) as parquet:
                for batch in parquet.iter_batches(batch_size=256, columns=[self._data.image_column]):
                    column = batch.column(0)
                    rows = wanted[(wanted >= start) & (wanted < start + len(column))]
                    for row in rows:
                        yield _decoded(column[int(row) - start].as_py(), f"row {row} of {path}")
                    start += len(column)
        except (pa.ArrowException, OSError) as error:
            raise BadData(f"cannot read {path}: {first_line(error)}") from None

    def image(self, index: int) -> Image.Image:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row, path = index - int(self._starts[number]), self._files[number].path
        try:
            parquet, starts = self._opened(path)
            group = int(np.searchsorted(starts, row, side="right")) - 1
            # One thread: a process that was forked has none of the pool's.
            table = parquet.read_row_group(group, columns=[self._data.image_column], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise BadData(f"cannot read {path}: {first_line(error)}") from None
        return _decoded(table.column(0)[row - int(starts[group])].as_py(), f"row {row} of {path}")

    def _opened(self, path: str) -> tuple[pq.ParquetFile, Indices]:
        """Return a file, opened once by each process, and the row that each of its row groups begins with."""
        if (os.getpid(), path) not in self._open:
            parquet = pq.ParquetFile(path, filesystem=self._filesystem, pre_buffer=False)
            rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            self._open[os.getpid(), path] = parquet, np.cumsum([0, *rows])
        return self._open[os.getpid(), path]


def _decoded(value: Any, where: str) -> Image.Image:
    return decode(value["bytes"] if isinstance(value, dict) else value, where)


def _class_of(file: fs.FileInfo) -> str:
    return PurePosixPath(file.path).parent.name


class FolderTable(Table):
    """Image files, one folder a class, classes numbered by their place in `classes`: the sorted ones of training."""

    def __init__(self, filesystem: fs.FileSystem, files: Sequence[fs.FileInfo], classes: Sequence[str]) -> None:
        self._filesystem, self._files = filesystem, files
        numbers = {name: number for number, name in enumerate(classes)}
        unknown = next((file for file in files if _class_of(file) not in numbers), None)
        if unknown is not None:
            raise BadData(f"{unknown.path} is of class {_class_of(unknown)!r}, of which training has no image")
        self.labels = np.array([numbers[_class_of(file)] for file in files], np.int64)
        lines = "\n".join(f"{f.path}:{f.size}:{f.mtime_ns}" for f in files)
        self.identity = hashlib.sha256(lines.encode()).hexdigest()

    def images(self, indices: Indices) -> Iterator[Image.Image]:
        yield from map(self.image, indices)

    def image(self, index: int) -> Image.Image:
        path = self._files[index].path
        with self._filesystem.open_input_file(path) as stream:
            return decode(stream.readall(), path)


class DatasetTable(Table):
    """A map-style dataset of (PIL image, integer label) pairs."""

    def __init__(self, dataset: Any, identity: str) -> None:
        self._dataset = dataset
        targets = getattr(dataset, "targets", None)
        if targets is None:
            targets = [dataset[i][1] for i in range(len(dataset))]
        self.labels = np.asarray(targets, np.int64)
        self.identity = f"{identity}: {len(self.labels)} images, {self._sample()}"

    def _sample(self) -> str:
        """Return a digest of the labels and of a few images: a dataset made by code has no date of its own."""
        digest = hashlib.sha256(self.labels.tobytes())
        for index in np.linspace(0, len(self.labels) - 1, min(16, len(self.labels))).astype(int):
            digest.update(self._dataset[int(index)][0].tobytes())
        return digest.hexdigest()

    def images(self, indices: Indices) -> Iterator[Image.Image]:
        yield from map(self.image, indices)

    def image(self, index: int) -> Image.Image:
        picture: Image.Image = self._dataset[int(index)][0]
        return picture


def _open_torchvision(data: DataSettings) -> dict[str, Table]:
    import torchvision

    import search_spaces.timm_compat  # noqa: F401  torchvision loads beside a CPU build of torch only after this

    dataset = getattr(torchvision.datasets, NAMED_DATA[data.path])
    root = resolve(data.root)[1]
    try:
        return {
            split: DatasetTable(dataset(root, train=split == "train", download=True), f"{data.path} {split} in {root}")
            for split in ("train", "test")
        }
    except (RuntimeError, OSError) as error:
        raise BadData(
            f"cannot download {data.path} to {root} ({first_line(error)}): put its files there, or give data.path "
            "a Parquet file or folder"
        ) from None


def _open_factory(name: str) -> dict[str, Table]:
    module, _, function = name.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadData(f"data.factory {name!r} is not an importable function: {error}") from None
    made = {split: factory(split) for split in ("train", "probe", "val", "test")}
    return {
        split: DatasetTable(dataset, f"{name}({split!r})") for split, dataset in made.items() if dataset is not None
    }


def decode(encoded: bytes, where: str) -> Image.Image:
    """Decode one image.

    Raises:
        BadData: the bytes are not an image, naming `where`.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except (UnidentifiedImageError, OSError, TypeError, ValueError) as error:
        raise BadData(f"cannot decode the image in {where}: {first_line(error)}") from None
    return image
