"""Training images that are decoded anew in every epoch: the same ones, with no cache."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SIDE, encoded, write_image_folder, write_table
from groups import in_a_group
from PIL import Image

from trainables.data import StreamedPixels, View, load_images
from trainables.dense import read_weights
from trainables.group import Group
from trainables.long_finetune import finetune
from trainables.settings import DataSettings, Recipe
from trainables.tables import BadData, open_tables
from trainables.tasks import FinetuneTask
from trainables.workspace import Workspace

VIEW = View((1, SIDE, SIDE), (0.4,), (0.25,), "bicubic", 1.0)


def pairs(split: str) -> list[tuple[Image.Image, int]] | None:
    return [(Image.new("L", (SIDE, SIDE), n), n % 3) for n in range(60)] if split == "train" else None


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Three files of several row groups each, which do not begin where batches of rows do."""
    folder = tmp_path / "numbered"
    folder.mkdir()
    pictures = [encoded(Image.new("L", (2, 2), n)) for n in range(250)]
    for part, rows in enumerate((range(10), range(10, 200), range(200, 250))):
        table = {"image": pa.array([pictures[n] for n in rows]), "label": pa.array(list(rows))}
        pq.write_table(pa.table(table), folder / f"train-{part:05d}.parquet", row_group_size=37)
    return folder


def test_any_row_of_parquet_files_is_the_right_one(parquet):
    table = open_tables(DataSettings(str(parquet)))["train"]
    drawn = np.random.default_rng(0).permutation(250)
    assert [table.image(int(n)).getpixel((0, 0)) for n in drawn] == drawn.tolist()


def test_a_broken_picture_is_named_by_row_and_file(tmp_path):
    pictures = pa.array([encoded(Image.new("L", (2, 2))), b"no picture"])
    pq.write_table(pa.table({"image": pictures, "label": [0, 1]}), tmp_path / "train.parquet", row_group_size=1)
    with pytest.raises(BadData, match=r"cannot decode the image in row 1 of .*train.parquet"):
        open_tables(DataSettings(str(tmp_path)))["train"].image(1)


@pytest.mark.parametrize("kind", ["parquet", "folder", "factory"])
def test_streamed_images_are_those_of_the_cache_bit_for_bit(tmp_path, kind):
    if kind == "parquet":
        write_table(tmp_path / "data" / "train.parquet", 60)
    elif kind == "folder":
        write_image_folder(tmp_path / "data" / "train", ("bag", "coat", "shoe"), 20)
    data = DataSettings(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    data = replace(data, path="", factory="test_streaming.pairs") if kind == "factory" else data
    cached = load_images(data, "train", VIEW, 0, limit=30)
    streamed = load_images(replace(data, stream="always"), "train", VIEW, 0, limit=30, streams=bool)
    assert isinstance(streamed.pixels, StreamedPixels)
    assert np.array_equal(streamed.labels, cached.labels)
    assert np.array_equal(np.stack([streamed.pixels[n] for n in range(30)]), cached.pixels)
    recipe = Recipe(batch_size=10)
    for workers in (0, 2):
        both = (images.train_batches(recipe, 1, 0, workers=workers) for images in (cached, streamed))
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(*both, strict=True))
    part = streamed.pixels[20::2]
    assert np.array_equal(part[1], cached.pixels[22])


def test_images_are_streamed_where_their_cache_would_not_fit(tmp_path, monkeypatch):
    write_table(tmp_path / "train.parquet", 60)
    data = DataSettings(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(BadData, match=r"set data\.cache_dir to a larger disk"):
        load_images(data, "train", VIEW, 0)
    with pytest.raises(BadData, match=r"set data\.cache_dir to a larger disk"):
        load_images(replace(data, stream="never"), "train", VIEW, 0, streams=bool)
    assert isinstance(load_images(data, "train", VIEW, 0, streams=bool).pixels, StreamedPixels)
    monkeypatch.undo()
    assert isinstance(load_images(data, "train", VIEW, 0, streams=bool).pixels, np.ndarray)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    # It is there already.
    assert isinstance(load_images(data, "train", VIEW, 0, streams=bool).pixels, np.ndarray)


def trained_with_little_room_for_one(group: Group, task: FinetuneTask) -> None:
    if group.rank == 1:
        shutil.disk_usage = lambda path: SimpleNamespace(free=1000)
    finetune(task, lambda _: None, group)


def test_workers_that_train_together_all_stream_where_one_of_them_has_to(tiny, tiny_data, tmp_path):
    """The room is looked at while others may be using it, and what one decides later would differ."""
    data = replace(tiny_data, cache_dir=str(tmp_path / "cache"))
    recipe = Recipe(epochs=1, batch_size=32)
    task = FinetuneTask(
        tiny, data, 0, "cpu", 1, "zero", recipe, "attn:1", str(tmp_path / "run"), "inputs", workers=2, fewest=2
    )
    Workspace(task).images("val")
    in_a_group(2, trained_with_little_room_for_one, task)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_a_streamed_fine_tune_ends_with_the_weights_of_a_cached_one_and_leaves_no_cache(tiny, tiny_data, tmp_path):
    recipe = Recipe(epochs=1, batch_size=32)
    ends = []
    for stream in ("always", "never"):
        data = replace(tiny_data, stream=stream, cache_dir=str(tmp_path / f"cache-{stream}"))
        task = FinetuneTask(tiny, data, 0, "cpu", 1, "zero", recipe, "attn:1", str(tmp_path / stream), "inputs")
        finetune(task, lambda _: None)
        ends.append(read_weights(task.weights))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    assert [len(list((tmp_path / f"cache-{stream}").glob("*.npy"))) for stream in ("always", "never")] == [1, 2]
