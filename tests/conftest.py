"""What all tests share: one thread, reproducible properties, a tiny model and tiny learnable data."""

import io
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis
import npu_stand_in
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from driver import dpt_search, embedded_part
from filelock import FileLock
from PIL import Image

from dpt_search.allowance import Prices
from dpt_search.config import RunConfig
from dpt_search.costs_table import write_costs
from dpt_search.probe_stage import prices_of
from dpt_search.run import Run, configured_run
from dpt_search.store import RunStore
from search_spaces.plan import Ranking
from trainables.profiling import profile
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.tasks import ProfileTask

torch.set_num_threads(1)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Begun in the background of a script: what tests start, and interrupt, would ignore that too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # of the processes that tests start
hypothesis.settings.register_profile(
    "dpt-search",
    derandomize=True,
    deadline=None,
    max_examples=40,
    print_blob=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("dpt-search")

CLASSES = 3
SIDE = 28
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, or one of several processes would end long after the others."""
    items.sort(key=lambda item: not item.path.stem.startswith("test_end_to_end"))


def tiny_image(label: int, rng: np.random.Generator) -> Image.Image:
    """Draw a noisy grey image whose bright horizontal band tells its class."""
    pixels = rng.integers(0, 120, (SIDE, SIDE))
    pixels[label * 9 : label * 9 + 9] += 110
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def write_table(path: Path, count: int, *, seed: int = 0, classes: int = CLASSES) -> np.ndarray:
    """Write a Parquet table in the Hugging Face image layout and return its labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    rows = [{"bytes": encoded(tiny_image(int(label) % CLASSES, rng)), "path": None} for label in labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE_TYPE), "label": pa.array(labels, pa.int64())}), path)
    return labels


def write_image_folder(root: Path, names: tuple[str, ...], per_class: int, *, seed: int = 0) -> None:
    """Write one folder of PNG files a class."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            tiny_image(label, rng).save(root / name / f"{index:03d}.png")


@pytest.fixture(scope="session")
def tiny() -> ModelSettings:
    """A ViT of four narrow blocks, with random weights."""
    kwargs = {"img_size": SIDE, "patch_size": 7, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return ModelSettings("vit_tiny_patch16_224", {**kwargs, "num_classes": CLASSES})


@pytest.fixture(scope="session")
def table_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one Parquet file a split; never written to by a test."""
    folder = tmp_path_factory.mktemp("table")
    for seed, (split, count) in enumerate({"train": 192, "probe": 24, "val": 48, "test": 60}.items()):
        write_table(folder / f"{split}.parquet", count, seed=seed)
    return folder


@pytest.fixture(scope="session")
def tiny_data(table_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    """The tiny table, with a cache that all tests share."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return DataSettings(str(table_folder), mean=[0.4], std=[0.25], crop_pct=1.0, subset=96, cache_dir=cache)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder of PNG files, one folder a class."""
    root = tmp_path / "pictures"
    write_image_folder(root, ("bag", "coat", "shoe"), 8)
    return root


def write_up_to_ranking(
    config: RunConfig, ranking: dict[str, Any], costs: list[dict[str, Any]], dense: dict[str, Any] | None = None
) -> RunStore:
    """Write the run directory of a run whose dense model, profile and ranking are done; return its store."""
    store = RunStore(config.run_dir)
    store.write_json("run.json", {"config": asdict(config), "versions": {}, "commit": "", "created": 1.0})
    store.write_json("dense/dense.json", {"accuracy": 0.875, "images": 48, **(dense or {})})
    store.write_json("ranking.json", ranking)
    write_costs(store, "a CPU", costs)
    return store


def loud(model: torch.nn.Module) -> torch.nn.Module:
    """Change a model's weights so that every layer matters, scales and biases too, and return it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


TINY_RANKING = Ranking((1, 0, 3, 2), (2, 0, 1, 3))
TINY_SPLITS = {"train": 192, "val": 48, "probe": 24}
"""Images of the tiny data's splits, of which a trial trains on half."""


@pytest.fixture(scope="session")
def tiny_costs(tiny: ModelSettings, tiny_data: DataSettings) -> list[dict[str, Any]]:
    """The profile of the tiny model."""
    rows: list[dict[str, Any]] = profile(ProfileTask(tiny, tiny_data, 0, "cpu", 1, "zero", batches=(1,), seconds=0.1))[
        "rows"
    ]
    return rows


@pytest.fixture
def tiny_run(tmp_path: Path, tiny: ModelSettings, tiny_data: DataSettings, tiny_costs: list[dict[str, Any]]) -> Run:
    """A run of the tiny model up to its ranking."""
    recipe = Recipe(epochs=1, batch_size=32, lr=0.02)
    config = RunConfig(
        tiny, tiny_data, run_dir=str(tmp_path / "run"), budget="units=2,4", trial=recipe, probe_epochs=1, probe_cells=3,
    )  # fmt: skip
    order = {"method": "taylor", "attn": list(TINY_RANKING.attn), "act": list(TINY_RANKING.act)}
    write_up_to_ranking(config, order, tiny_costs, {"units": {"attn": [0], "act": [0]}, "splits": TINY_SPLITS})
    return configured_run(config, lambda _: None)


def tiny_prices(run: Run) -> Prices:
    """Return what trials and probe of a tiny run cost."""
    prices = prices_of(run)
    assert prices is not None
    return prices


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that all processes that test share, made by the first of them that wants it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def npu_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, in PYTHONPATH, makes this machine one with two NPUs."""
    if missing := npu_stand_in.tools_missing():
        pytest.skip(f"the stand-in for an NPU cannot be built here without {missing}")
    return made_once(tmp_path_factory, "npu_host", npu_stand_in.install)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of a short run on a small part of the embedded images."""

    def make(folder: Path) -> None:
        embedded_part(
            folder, {"train": 640, "probe": 100, "val": 300, "test": 300}, data={"subset": 320}, max_trials=4,
            max_concurrent=1, timing_seconds=1.0, rank_batches=2, probe_epochs=1, checkpoint_seconds=0.0,
            trial={"epochs": 2, "batch_size": 32}, finetune={"epochs": 4, "batch_size": 32},
        )  # fmt: skip

    return made_once(tmp_path_factory, "small", make) / "run.yaml"


@pytest.fixture(scope="session")
def finished(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `small`, never written to, and beside it `printed.txt`."""

    def make(folder: Path) -> None:
        done = dpt_search("run", "--config", small, "--run-dir", folder / "run")
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "printed.txt").write_text(done.stdout)

    return made_once(tmp_path_factory, "finished", make) / "run"
