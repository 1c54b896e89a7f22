"""Image tables, splits, the decoded cache, and what is said when the data cannot be used."""

import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CLASSES, SIDE, encoded, tiny_image, write_image_folder, write_table
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from search_spaces import BadInput
from trainables.data import View, carved_splits, load_images
from trainables.dense import build_model
from trainables.dense_check import check_model
from trainables.settings import DataSettings
from trainables.splits import assign, balanced_subset
from trainables.tables import BadData, open_tables
from trainables.tasks import Task

VIEW = View((1, SIDE, SIDE), (0.4,), (0.25,), "bicubic", 1.0)
labelled = st.lists(st.integers(0, 4), min_size=1, max_size=120).map(lambda labels: np.array(labels, np.int64))
seeds = st.integers(0, 2**32 - 1)


def source(path: Path, cache: Path, **rest: object) -> DataSettings:
    return DataSettings(str(path), cache_dir=str(cache), **rest)


def test_a_parquet_file_is_the_training_part_in_its_own_order(tmp_path):
    labels = write_table(tmp_path / "all.parquet", 30)
    table = open_tables(source(tmp_path / "all.parquet", tmp_path))
    assert list(table) == ["train"]
    assert np.array_equal(table["train"].labels, labels)
    bands = [np.asarray(image).reshape(SIDE, SIDE)[:27].reshape(3, -1).mean(1).argmax()
             for image in table["train"].images(np.arange(30))]  # fmt: skip
    assert np.array_equal(bands, labels)


@given(wanted=st.sets(st.integers(0, 599), min_size=1, max_size=40))
def test_any_rows_of_several_files_and_batches_are_the_right_ones(tmp_path_factory, wanted):
    folder = tmp_path_factory.getbasetemp() / "numbered"
    if not folder.exists():
        folder.mkdir()
        pictures = [encoded(Image.new("L", (2, 2), n % 251)) for n in range(600)]
        for part, rows in enumerate((range(10), range(10, 550), range(550, 600))):
            table = {"image": pa.array([pictures[n] for n in rows]), "label": pa.array([n % 251 for n in rows])}
            pq.write_table(pa.table(table), folder / f"train-{part:05d}-of-00003.parquet", row_group_size=100)
    table = open_tables(source(folder, folder))["train"]
    indices = np.array(sorted(wanted))
    found = [image.getpixel((0, 0)) for image in table.images(indices)]
    assert found == (indices % 251).tolist() == table.labels[indices].tolist()


def test_splits_are_found_by_file_name_and_by_folder(tmp_path, table_folder):
    assert set(open_tables(source(table_folder, tmp_path))) == {"train", "probe", "val", "test"}
    for name in ("train-00000-of-00001", "validation-0", "test_0"):
        write_table(tmp_path / "named" / f"{name}.parquet", 6)
    assert set(open_tables(source(tmp_path / "named", tmp_path))) == {"train", "val", "test"}
    for split in ("train", "val"):
        write_image_folder(tmp_path / "imagenet" / split, ("n01", "n02"), 2)
    assert set(open_tables(source(tmp_path / "imagenet", tmp_path))) == {"train", "test"}


def test_an_image_folder_has_its_classes_by_sorted_name(tmp_path, image_folder):
    table = open_tables(source(image_folder, tmp_path))["train"]
    assert table.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_classes_of_a_split_are_numbered_as_in_training(tmp_path):
    write_image_folder(tmp_path / "set" / "train", ("bag", "coat", "shoe"), 4)
    write_image_folder(tmp_path / "set" / "test", ("bag", "shoe"), 4)
    tables = open_tables(source(tmp_path / "set", tmp_path))
    assert tables["train"].labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert tables["test"].labels.tolist() == [0] * 4 + [2] * 4


def test_a_class_that_training_lacks_is_refused(tmp_path):
    write_image_folder(tmp_path / "set" / "train", ("bag", "coat"), 4)
    write_image_folder(tmp_path / "set" / "test", ("bag", "shoe"), 4)
    with pytest.raises(BadData, match="class 'shoe'"):
        open_tables(source(tmp_path / "set", tmp_path))


def test_renaming_a_class_folder_does_not_bring_back_pictures_of_the_old_order(tmp_path, image_folder):
    data = source(image_folder, tmp_path / "cache")
    load_images(data, "train", VIEW, 0)
    (image_folder / "coat").rename(image_folder / "vest")
    images = load_images(data, "train", VIEW, 0)
    bands = images.pixels[:, :27, :, 0].reshape(len(images), 3, -1).mean(-1).argmax(-1)
    assert {(int(band), int(label)) for band, label in zip(bands, images.labels, strict=True)} == {
        (0, 0),
        (1, 2),
        (2, 1),
    }


def factory(split: str) -> list[tuple[Image.Image, int]] | None:
    rng = np.random.default_rng(zlib.crc32(split.encode()))
    return [(tiny_image(n % CLASSES, rng), n % CLASSES) for n in range(40)] if split != "probe" else None


def test_a_function_of_the_users_gives_the_splits_it_has(tmp_path):
    data = DataSettings(factory="test_data.factory", cache_dir=str(tmp_path))
    assert set(open_tables(data)) == {"train", "val", "test"}
    images = load_images(data, "val", VIEW, 0)
    assert len(images) == 40
    assert np.array_equal(images.pixels[3, ..., 0], np.asarray(factory("val")[3][0]))
    with pytest.raises(BadData, match="not an importable function"):
        open_tables(DataSettings(factory="test_data.nothing"))


def _broken(tmp_path: Path, name: str) -> DataSettings:
    """Make one kind of data that cannot be used."""
    path = tmp_path / "data.parquet"
    write_table(path, 24)
    table = pq.read_table(path)
    if name == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif name == "not parquet":
        path.write_bytes(b"label,image\n1,2\n")
    elif name == "no label column":
        pq.write_table(table.rename_columns(["image", "fine_label"]), path)
    elif name == "labels are text":
        pq.write_table(table.set_column(1, "label", pa.array(["coat"] * 24)), path)
    elif name == "labels are missing":
        pq.write_table(table.set_column(1, "label", pa.array([1, None] * 12)), path)
    elif name == "image is text":
        pq.write_table(table.set_column(0, "image", pa.array([b"no image"] * 24)), path)
    elif name == "image is missing":
        pq.write_table(table.set_column(0, "image", pa.array([None] * 24, pa.binary())), path)
    elif name == "no rows":
        pq.write_table(table.slice(0, 0), path)
    elif name == "no path":
        path = tmp_path / "nowhere"
    elif name == "empty folder":
        path = tmp_path / "empty"
        path.mkdir()
    elif name == "no training part":
        path = tmp_path / "only"
        write_table(path / "test.parquet", 6)
    return source(path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("truncated", "cannot read .*data.parquet as Parquet"),
        ("not parquet", "cannot read .*data.parquet as Parquet"),
        ("no label column", "no column 'label' .*image, fine_label.* set data.image_column and data.label_column"),
        ("labels are text", "integer labels"),
        ("labels are missing", "integer labels"),
        ("image is text", r"cannot decode the image in row \d+ of .*data.parquet"),
        ("image is missing", r"cannot decode the image in row \d+ of .*data.parquet"),
        ("no rows", "no rows in the train split"),
        ("no path", "nowhere' does not exist: give a Parquet file or folder"),
        ("empty folder", "neither .parquet files nor images"),
        ("no training part", "no training images .* name a file or folder 'train"),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_one_line(tmp_path, name, said):
    with pytest.raises(BadData, match=said) as raised:
        load_images(_broken(tmp_path, name), "train", VIEW, 0)
    assert isinstance(raised.value, BadInput)
    assert "\n" not in str(raised.value)
    assert {path.suffix for path in tmp_path.glob("cache/*")} <= {".lock"}


@pytest.mark.parametrize("label", [CLASSES, -1])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_label_outside_the_models_classes_is_refused_before_anything_starts(tmp_path, tiny, label, split):
    for name in ("train", "val", "test"):
        write_table(tmp_path / f"{name}.parquet", 90)
    path = tmp_path / f"{split}.parquet"
    pq.write_table(pq.read_table(path).set_column(1, "label", pa.array([label] + [0] * 89)), path)
    data = source(tmp_path, tmp_path / "cache", mean=[0.4], std=[0.25], crop_pct=1.0)
    with pytest.raises(BadData, match=rf"{split} has label {label}, but the model has 3 classes \(0 to 2\)"):
        check_model(Task(tiny, data, 0, "cpu", 1, "zero"))


def test_mean_and_std_need_a_value_for_every_channel(tiny):
    with pytest.raises(BadData, match=r"1 channels, so data\.mean and data\.std need 1 values"):
        View.of(build_model(tiny), DataSettings())


@given(labelled, st.integers(0, 130), seeds)
def test_a_subset_is_balanced_sorted_and_fixed_by_its_seed(labels, size, seed):
    found = balanced_subset(labels, size, seed)
    assert np.array_equal(found, balanced_subset(labels, size, seed))
    assert np.array_equal(found, np.unique(found))
    assert len(found) == (min(size, len(labels)) or len(labels))
    available, taken = np.bincount(labels, minlength=5), np.bincount(labels[found], minlength=5)
    short = taken < taken.max() - 1
    assert np.array_equal(taken[short], available[short])


@given(labelled, st.sets(st.sampled_from(["probe", "val", "test"])), seeds)
def test_carved_splits_share_no_image_and_leave_none_out(labels, missing, seed):
    labels = np.resize(labels, 20 * len(labels))
    parts = assign(labels, frozenset({"train", "probe", "val", "test"} - missing), seed)
    assert set(parts) == missing | {"train"}
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(labels)))
    again = assign(labels, frozenset({"train", "probe", "val", "test"} - missing), seed)
    assert all(np.array_equal(parts[split], again[split]) for split in parts)
    assert all(len(parts[split]) == max(1, int({"probe": 0.05}.get(split, 0.1) * len(labels))) for split in missing)


def test_another_seed_carves_other_images():
    labels = np.arange(400) % 4
    assert not np.array_equal(*(assign(labels, frozenset({"train"}), seed)["val"] for seed in (0, 1)))


def test_carved_splits_are_named_for_the_warning(tmp_path, table_folder, image_folder):
    assert carved_splits(source(table_folder, tmp_path)) == []
    assert carved_splits(source(image_folder, tmp_path)) == ["val", "test"]


def test_cached_pixels_are_those_of_the_images_and_read_only(tiny_data):
    images = load_images(tiny_data, "val", VIEW, 0)
    decoded = np.stack([np.asarray(i) for i in open_tables(tiny_data)["val"].images(np.arange(48))])
    assert np.array_equal(images.pixels[..., 0], decoded)
    assert isinstance(images.pixels, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images.pixels[0] = 0


SLOW = """
import os, sys, time
from PIL import Image
from trainables.data import View, load_images
from trainables.settings import DataSettings

HERE = os.path.dirname(__file__)

class Slow:
    targets = [n % 3 for n in range(60)]
    def __len__(self):
        return 60
    def __getitem__(self, index):
        time.sleep(0.005)
        return Image.new("L", (28, 28), index), index % 3

def factory(split):
    return Slow() if split == "train" else None

if __name__ == "__main__":
    open(f"{HERE}/{os.getpid()}.ready", "w").close()
    give_up = time.time() + 30
    while sum(name.endswith(".ready") for name in os.listdir(HERE)) < 2 and time.time() < give_up:
        time.sleep(0.001)
    view = View((1, 28, 28), (0.4,), (0.25,), "bicubic", 1.0)
    pixels = load_images(DataSettings(factory="slow.factory", cache_dir=sys.argv[1]), "train", view, 0).pixels
    print(os.stat(pixels.filename).st_ino, int(pixels.sum()))
"""


@pytest.mark.timeout(120)
def test_processes_at_once_and_one_after_share_the_file_that_one_of_them_made(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "cache")]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0].strip() for process in started}
    later = load_images(DataSettings(factory="slow.factory", cache_dir=str(tmp_path / "cache")), "train", VIEW, 0)
    assert said == {f"{Path(later.pixels.filename).stat().st_ino} {later.pixels.sum()}"}
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_changed_data_another_subset_and_another_size_are_decoded_anew(tmp_path):
    path = tmp_path / "data.parquet"
    write_table(path, 40)
    data = source(path, tmp_path / "cache")
    load_images(data, "train", VIEW, 0)
    assert len(load_images(data, "train", VIEW, 0, limit=9)) == 9
    assert load_images(data, "train", replace(VIEW, input_size=(1, 14, 14)), 0).pixels.shape[1:] == (14, 14, 1)
    assert load_images(data, "train", replace(VIEW, input_size=(3, 28, 28)), 0).pixels.shape[1:] == (28, 28, 3)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 4
    write_table(path, 40, seed=9)
    kept = {image.tobytes() for image in open_tables(data)["train"].images(np.arange(40))}
    assert all(row.tobytes() in kept for row in load_images(data, "train", VIEW, 0).pixels)


def test_a_picture_of_any_shape_is_cropped_from_its_middle(tmp_path):
    wide = Image.new("L", (84, 28))
    wide.paste(255, (28, 0, 56, 28))
    pq.write_table(pa.table({"image": pa.array([encoded(wide)] * 20), "label": [0] * 20}), tmp_path / "wide.parquet")
    images = load_images(source(tmp_path / "wide.parquet", tmp_path), "train", VIEW, 0)
    assert images.pixels.min() == 255
