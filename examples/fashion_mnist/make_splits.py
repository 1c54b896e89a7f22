"""Make the embedded Parquet splits from the full Fashion-MNIST data set (MIT licence, Zalando SE).

    python examples/fashion_mnist/make_splits.py [FOLDER]

FOLDER holds the four official .gz files (Debian's package dataset-fashion-mnist puts them into
/usr/share/datasets/fashion-mnist); without it torchvision downloads them. `train`, `probe` and `val` are
class-balanced, disjoint parts of the official training images, `test` of the official test images. With
`--full FOLDER` the training images that are in neither `probe` nor `val`, and these two, go into FOLDER too: what
train_dense.py learns from.
"""

import argparse
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from trainables.splits import balanced_subset

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
OUT = Path(__file__).parents[2] / "dpt_search" / "embedded" / "fashion_mnist"
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="folder with the official .gz files")
    parser.add_argument("--full", type=Path, help="also write every training image outside probe and val, here")
    args = parser.parse_args()
    images, labels = read_official(args.folder, "train", "train")
    test_images, test_labels = read_official(args.folder, "t10k", "test")

    held_out = balanced_subset(labels, 4500, SEED)
    probe = held_out[balanced_subset(labels[held_out], 1500, SEED)]
    val = np.setdiff1d(held_out, probe)
    rest = np.setdiff1d(np.arange(len(labels)), held_out)
    train = rest[balanced_subset(labels[rest], 12_000, SEED)]
    test = balanced_subset(test_labels, 4000, SEED)

    for split, indices in {"train": train, "probe": probe, "val": val}.items():
        write(OUT / f"{split}.parquet", images[indices], labels[indices])
    write(OUT / "test.parquet", test_images[test], test_labels[test])
    if args.full:
        for split, indices in {"train": rest, "probe": probe, "val": val}.items():
            write(args.full / f"{split}.parquet", images[indices], labels[indices])


def read_official(folder: str | None, prefix: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 (N, 28, 28), and labels, (N,)."""
    if folder is None:
        import torchvision

        import search_spaces.timm_compat  # noqa: F401  torchvision loads beside a CPU build of torch only after this

        dataset = torchvision.datasets.FashionMNIST("data", train=split == "train", download=True)
        return dataset.data.numpy(), dataset.targets.numpy()
    images, classes = (Path(folder, f"{prefix}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress(classes.read_bytes()), np.uint8, offset=8)
    return pixels.reshape(-1, 28, 28), labels.astype(np.int64)


def write(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write one split in the Hugging Face image layout."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": CLASSES, "_type": "ClassLabel"},
    }
    encoded = pa.array(
        [{"bytes": to_png(image), "path": None} for image in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": encoded, "label": pa.array(labels, pa.int64())})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")
    print(f"{path}: {len(labels)} images, {path.stat().st_size / 1e6:.1f} MB")


def to_png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", optimize=True)
    return stream.getvalue()


if __name__ == "__main__":
    main()
