"""Train the embedded dense model: a 12-block Vision Transformer of width 64 on Fashion-MNIST.

    python examples/fashion_mnist/make_splits.py [FOLDER] --full data/fashion_mnist_full
    python examples/fashion_mnist/train_dense.py data/fashion_mnist_full

It learns from the official training images that are in neither `probe` nor `val`, prints the accuracy on `val` after
every epoch, and goes on from its last epoch when started again. About an hour of one core.
"""

import argparse
from pathlib import Path

import safetensors.torch
import torch

from trainables.data import View, load_images
from trainables.dense import build_model
from trainables.engine import Training, evaluate
from trainables.settings import DataSettings, ModelSettings, Recipe

OUT = Path(__file__).parents[2] / "dpt_search" / "embedded" / "fashion_mnist" / "dense.safetensors"
MODEL = ModelSettings(
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 64, "depth": 12, "num_heads": 4}
    | {"num_classes": 10},
)
RECIPE = Recipe(
    epochs=30, batch_size=128, lr=6e-3, min_lr=1e-5, warmup_epochs=2, weight_decay=0.05, label_smoothing=0.1,
    drop_path=0.05, ema=0.9995, crop_scale=0.75, random_erasing=0.1,
)  # fmt: skip
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder that make_splits.py --full wrote")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    data = DataSettings(path=args.data, mean=[0.2860], std=[0.3530], crop_pct=1.0)
    model = build_model(MODEL, seed=SEED, drop_path=RECIPE.drop_path)
    view = View.of(model, data)
    device = torch.device("cpu")
    train, val = (load_images(data, split, view, SEED) for split in ("train", "val"))
    training = Training(model, train, RECIPE, device=device, seed=SEED)
    checkpoint = Path(args.data) / "dense_checkpoint.pt"
    if checkpoint.exists():
        training.load_state_dict(torch.load(checkpoint, weights_only=True))
    while training.epochs_done < RECIPE.epochs:
        epoch = training.run_epoch()
        accuracy = evaluate(training.result, val, device).mean()
        rate = epoch.images / epoch.seconds
        print(f"epoch {epoch.number}: loss {epoch.loss:.4f}, val {accuracy:.4f}, {rate:.0f} images/s", flush=True)
        torch.save(training.state_dict(), checkpoint)
    safetensors.torch.save_file(training.result.state_dict(), OUT)
    print(f"{OUT}: {OUT.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
