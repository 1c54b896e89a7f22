"""Train the embedded dense model: a 12-block Vision Transformer of width 64 on Fashion-MNIST.

    python examples/fashion_mnist/make_splits.py [FOLDER] --full data/fashion_mnist_full
    python examples/fashion_mnist/train_dense.py data/fashion_mnist_full

It learns from the official training images that are in neither `probe` nor `val`. It keeps 6 % of them back to print an
accuracy after every epoch; the embedded `probe`, `val` and `test` it never reads. Started again, it goes on from its
last epoch. About an hour of one core.
"""

import argparse
from pathlib import Path

import safetensors.torch
import torch

from trainables.data import ImageSet, View, load_images
from trainables.dense import build_model
from trainables.engine import Training, evaluate
from trainables.settings import DataSettings, ModelSettings, Recipe

OUT = Path(__file__).parents[2] / "dpt_search" / "embedded" / "fashion_mnist" / "dense.safetensors"
MODEL = ModelSettings(
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 64, "depth": 12, "num_heads": 4}
    | {"num_classes": 10},
)
PHASES = (
    Recipe(
        epochs=30, batch_size=128, lr=6e-3, min_lr=1e-5, warmup_epochs=2, weight_decay=0.05, label_smoothing=0.1,
        drop_path=0.05, ema=0.9995, crop_scale=0.75, random_erasing=0.1,
    ),
    # Random crops make things look larger in training than in evaluation: the end is with nearly whole images.
    Recipe(
        epochs=16, batch_size=128, lr=3e-3, min_lr=1e-5, warmup_epochs=0.5, weight_decay=0.05, label_smoothing=0.1,
        drop_path=0.05, ema=0.9995, crop_scale=0.95,
    ),
)  # fmt: skip
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder that make_splits.py --full wrote")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    data = DataSettings(path=args.data, mean=[0.2860], std=[0.3530], crop_pct=1.0)
    model = build_model(MODEL, seed=SEED, drop_path=PHASES[0].drop_path)
    view = View.of(model, data)
    train, watched = (load_images(data, split, view, SEED) for split in ("train", "val"))
    for number, recipe in enumerate(PHASES):
        training = Training(model, train, recipe, device=torch.device("cpu"), seed=SEED + number)
        run_phase(training, recipe, watched, Path(args.data) / f"dense_phase{number}.pt")
        model.load_state_dict(training.result.state_dict())
    OUT.write_bytes(safetensors.torch.save(model.state_dict()))
    print(f"{OUT}: {OUT.stat().st_size / 1e6:.1f} MB")


def run_phase(training: Training, recipe: Recipe, watched: ImageSet, checkpoint: Path) -> None:
    """Train the epochs of a recipe that are left."""
    if checkpoint.exists():
        training.load_state_dict(torch.load(checkpoint, weights_only=True))
    while training.epochs_done < recipe.epochs:
        epoch = training.run_epoch()
        accuracy = evaluate(training.result, watched, torch.device("cpu")).mean()
        rate = epoch.images / epoch.seconds
        print(f"epoch {epoch.number}: loss {epoch.loss:.4f}, accuracy {accuracy:.4f}, {rate:.0f} images/s", flush=True)
        torch.save(training.state_dict(), checkpoint)


if __name__ == "__main__":
    main()
