"""Does the data path keep up with training, and what memory does a trial take?

    python benchmarks/data_throughput.py [--images 20000] [--out benchmarks/results/data_throughput.json]

Three cases: the embedded default, and a folder of Parquet (row groups of 100 rows, as Hugging Face writes images) with
generated 256 x 256 JPEGs and vit_tiny_patch16_224, with the cache of decoded images and without, streamed. For each,
images per second of the loader alone and of training (loader and step), interleaved, one thread, medians; the time to
build the cache; and the memory of two trials' processes that train at the same time, on one cache where there is one.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from dpt_search.options import read_config
from trainables.data import ImageSet
from trainables.engine import Training
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.tasks import Task
from trainables.workspace import Workspace, versions

OUT = Path(__file__).parent / "results" / "data_throughput.json"
CLASSES, ROWS, GROUP = 100, 2000, 100
TRAIN_STEPS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="number of generated JPEGs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="data_throughput_") as scratch:
        task, recipe = jpeg_case(scratch, args.images)
        streamed = replace(task, data=replace(task.data, stream="always", cache_dir=f"{scratch}/none"))
        cases = {
            "embedded default": default_case(scratch),
            "256 x 256 JPEGs": (task, recipe),
            "256 x 256 JPEGs, streamed": (streamed, recipe),
        }
        found = {name: measure(*case, args.repeats) for name, case in cases.items()}
    for name, row in found.items():
        print(
            f"{name}: loader {row['loader_images_per_second']:,.0f} images/s, "
            f"training {row['training_images_per_second']:,.0f} images/s, ratio {row['ratio']:.1f}; "
            f"cache of {row['images']:,} images, {row['cache_gib']:.2f} GiB, "
            f"there after {row['build_seconds']:.1f} s; two trials at once: "
            f"{row['private_gib_loading']:.2f} GiB private each while loading, {row['private_gib_training']:.2f} while "
            f"training, {row['cache_files']} cache file(s)"
        )
    about = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": 1, **versions()}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"about": about, "cases": found}, indent=1) + "\n")


def default_case(scratch: str) -> tuple[Task, Recipe]:
    config = read_config("run", [])
    data = replace(config.data, cache_dir=f"{scratch}/default", stream="never")
    return Task(config.model, data, seed=0, device="cpu", threads=1, attention="zero"), config.trial


def jpeg_case(scratch: str, images: int) -> tuple[Task, Recipe]:
    """Write smooth random pictures, as large as photographs of that size, in the Hugging Face layout."""
    folder = Path(scratch) / "jpegs"
    folder.mkdir()
    generator = np.random.default_rng(0)
    parts = [("train", start, min(ROWS, images - start)) for start in range(0, images, ROWS)]
    for split, start, rows in [*parts, ("val", 0, CLASSES), ("test", 0, CLASSES)]:
        encoded = [{"bytes": jpeg(generator), "path": None} for _ in range(rows)]
        labels = np.arange(start, start + rows) % CLASSES
        column = pa.array(encoded, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        table, file = pa.table({"image": column, "label": labels}), folder / f"{split}-{start:06d}.parquet"
        pq.write_table(table, file, row_group_size=GROUP)
    model = ModelSettings("vit_tiny_patch16_224", {"num_classes": CLASSES})
    data = DataSettings(path=str(folder), subset=images, cache_dir=f"{scratch}/cache", stream="never")
    return Task(model, data, seed=0, device="cpu", threads=1, attention="zero"), Recipe(batch_size=16)


def jpeg(generator: np.random.Generator) -> bytes:
    coarse = Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((256, 256), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def measure(task: Task, recipe: Recipe, repeats: int) -> dict[str, float]:
    workspace = Workspace(task)
    start = time.perf_counter()
    train = workspace.images("train", task.data.subset, streams=bool)
    build = time.perf_counter() - start
    steps = min(TRAIN_STEPS * 8 if len(train) <= 4000 else TRAIN_STEPS, len(train) // recipe.batch_size)
    pairs = [(load(train, recipe, steps, n), learn(workspace, train, recipe, steps)) for n in range(repeats)]
    loading, training = two_trials(task, recipe)
    cache = list(Path(task.data.cache_dir).glob("*.npy"))
    return {
        "images": len(train),
        "cache_gib": sum(p.stat().st_size for p in cache) / 2**30,
        "cache_files": len(cache),
        "build_seconds": build,
        "loader_images_per_second": statistics.median(a for a, _ in pairs),
        "training_images_per_second": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "private_gib_loading": loading,
        "private_gib_training": training,
    }


def load(train: ImageSet, recipe: Recipe, steps: int, epoch: int) -> float:
    """Return images per second of the loader alone."""
    batches = train.train_batches(recipe, 0, epoch)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * recipe.batch_size / (time.perf_counter() - start)


def learn(workspace: Workspace, train: ImageSet, recipe: Recipe, steps: int) -> float:
    """Return images per second of training, the loader included."""
    few = ImageSet(train.pixels[: steps * recipe.batch_size], train.labels[: steps * recipe.batch_size], train.view)
    training = Training(build(workspace), few, recipe, device=workspace.device, seed=0)
    epoch = training.run_epoch()
    return epoch.images / epoch.seconds


def build(workspace: Workspace) -> torch.nn.Module:
    from search_spaces.plan import PruningPlan

    return workspace.pruned(PruningPlan())


def two_trials(task: Task, recipe: Recipe) -> tuple[float, float]:
    """Return the larger peaks of private memory, in GiB, of two processes that load and train at once on one cache."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        peaks = np.array(pool.starmap(trial_memory, [(task, recipe)] * 2)) / 2**30
    return float(peaks[:, 0].max()), float(peaks[:, 1].max())


def trial_memory(task: Task, recipe: Recipe) -> tuple[int, int]:
    """Read every image once, then train a little; return the peaks of what is this process's own after each."""
    peak, ended = private_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    workspace = Workspace(task)
    train = workspace.images("train", task.data.subset, streams=bool)
    for _ in train.train_batches(recipe, 0, 0):
        pass
    loading = peak
    learn(workspace, train, recipe, TRAIN_STEPS)
    ended.set()
    watcher.join()
    return loading, peak


def private_bytes() -> int:
    """Return anonymous memory: the pages of the memory map are shared, and the kernel takes them back at need."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
