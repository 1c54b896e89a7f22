"""The data set and the dense model that the package ships."""

import importlib.resources
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from trainables.engine import evaluate
from trainables.settings import DataSettings, ModelSettings
from trainables.tables import decode, open_tables
from trainables.tasks import Task
from trainables.workspace import Workspace

FOLDER = Path(str(importlib.resources.files("dpt_search") / "embedded" / "fashion_mnist"))
SIZES = {"train": 12_000, "probe": 1_500, "val": 3_000, "test": 4_000}


@pytest.fixture(scope="module")
def settings():
    return yaml.safe_load((FOLDER / "run.yaml").read_text())


@pytest.fixture(scope="module")
def workspace(settings, tmp_path_factory):
    data = DataSettings(**settings["data"], cache_dir=str(tmp_path_factory.mktemp("embedded")))
    return Workspace(Task(ModelSettings(**settings["model"]), data, 0, "cpu", 1, "zero"))


@pytest.fixture(scope="module")
def encoded():
    """The encoded images by split."""
    return {
        split: [row["bytes"] for row in pq.read_table(FOLDER / f"{split}.parquet").column("image").to_pylist()]
        for split in SIZES
    }


@pytest.mark.parametrize("split", SIZES)
def test_a_split_has_its_size_and_as_many_images_of_every_class(settings, split):
    labels = open_tables(DataSettings(**settings["data"]))[split].labels
    assert np.bincount(labels).tolist() == [SIZES[split] // 10] * 10


def test_no_image_is_in_two_splits(encoded):
    seen = {split: set(images) for split, images in encoded.items()}
    for first in SIZES:
        for second in SIZES:
            assert first == second or not seen[first] & seen[second], (first, second)


@pytest.mark.parametrize("split", SIZES)
def test_images_are_grey_and_28_pixels_a_side(encoded, split):
    for content in encoded[split][:: len(encoded[split]) // 50]:
        image = decode(content, split)
        assert (image.mode, image.size) == ("L", (28, 28))


def test_no_picture_is_in_two_splits_as_pixels(encoded):
    pixels = {split: {decode(content, split).tobytes() for content in images} for split, images in encoded.items()}
    assert sum(map(len, pixels.values())) == len(set().union(*pixels.values()))


def test_mean_and_deviation_are_those_of_the_training_images(workspace):
    pixels = workspace.images("train").pixels / 255
    assert pixels.mean() == pytest.approx(workspace.view.mean[0], abs=0.01)
    assert pixels.std() == pytest.approx(workspace.view.std[0], abs=0.01)


def test_the_whole_weighs_what_a_package_may(settings):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 15e6
    assert settings["model"]["checkpoint"].endswith("/dense.safetensors")


@pytest.mark.timeout(120)
def test_the_dense_model_is_right_on_most_of_the_test_images(workspace):
    right = evaluate(workspace.dense, workspace.images("test", may_read_test=True), workspace.device)
    assert right.mean() >= 0.88
