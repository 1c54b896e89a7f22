"""What a worker is told: plain frozen data, torch-free, so that the driver can check and record it.

Every field's docstring is its help text on the command line.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

NAMED_DATA = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
"""Data sets that `data.path` may name instead of a place, and torchvision's classes for them."""


@dataclass(frozen=True)
class ModelSettings:
    """The dense model."""

    name: str = ""
    """timm name of the dense model, such as deit_small_patch16_224."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, such as img_size or num_classes."""
    checkpoint: str = ""
    """Weights to start from: a path or URI (safetensors, or what torch.load(weights_only=True) reads), 'pretrained'
    for timm's own, empty for random weights."""
    new_head: bool = False
    """Leave the checkpoint's classifier out and start a new one, for other classes; needs --adapt-epochs."""
    gated: Literal["keep", "absorb"] = "keep"
    """Gated MLPs (SwiGLU, GLU): keep them, with no activation to remove; or absorb, fit plain ones to them on data."""


@dataclass(frozen=True)
class DataSettings:
    """Images and labels."""

    path: str = ""
    """Parquet file or folder in the Hugging Face image layout, image folder, or torchvision name (cifar10, cifar100,
    fashion_mnist). Any pyarrow.fs URI; 'package:NAME/PATH' is a file inside an installed package."""
    factory: str = ""
    """Instead of a path: dotted name of a function of yours, called as factory(split) and returning a map-style dataset
    of (PIL image, integer label) pairs."""
    root: str = "~/.cache/dpt_search/datasets"
    """Where torchvision downloads to."""
    image_column: str = "image"
    """Parquet column with the encoded image (bytes, or a struct with a field 'bytes')."""
    label_column: str = "label"
    """Parquet column with the integer label, from 0."""
    mean: list[float] = field(default_factory=list)
    """Channel means for normalisation; empty: those of the model."""
    std: list[float] = field(default_factory=list)
    """Channel standard deviations for normalisation; empty: those of the model."""
    crop_pct: float = 0.0
    """Share of the image's side kept by the centre crop of evaluation; 0: that of the model."""
    subset: int = 4000
    """Number of training images in the search subset (class-balanced, fixed by the seed; 0: all)."""
    val_limit: int = 0
    """Use at most this many images of val in trials (class-balanced, fixed by the seed; 0: all)."""
    workers: int = 0
    """Loader processes per trial; 0 loads in the training process."""
    stream: Literal["auto", "always", "never"] = "auto"
    """Decode the long fine-tune's training images anew in every epoch, without a cache: where its cache would not fit
    on the disk (auto), always, or never."""
    cache_dir: str = "~/.cache/dpt_search/images"
    """Node-local folder for decoded images, shared by all trials on the node."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: the same fields for a trial, for adapting a dense model and for the long fine-tune."""

    epochs: int = 2
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step over all workers."""
    lr: float = 5e-4
    """Peak learning rate of AdamW at batch size 512; scaled linearly with the batch size."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up; a fraction is allowed."""
    weight_decay: float = 0.05
    """AdamW weight decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decays of AdamW's two moving averages."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    label_smoothing: float = 0.1
    """Weight taken from the true class and spread over all."""
    mixup: float = 0.0
    """Mixup alpha; 0 turns it off."""
    cutmix: float = 0.0
    """CutMix alpha; 0 turns it off."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block, growing linearly from 0 at the first."""
    ema: float = 0.0
    """Decay of the weights' moving average; 0 turns it off. With it, the average is what is evaluated and kept."""
    distillation: Literal["none", "soft", "hard"] = "none"
    """Learn from the dense model too: its probabilities (soft) or its choices (hard)."""
    distillation_alpha: float = 0.5
    """Weight of the distillation loss; the labels' loss has the rest."""
    temperature: float = 2.0
    """Softens both sides of soft distillation."""
    auto_augment: str = ""
    """timm augmentation policy such as rand-m9-mstd0.5-inc1; empty turns it off."""
    random_erasing: float = 0.0
    """Probability of erasing a patch of an image."""
    crop_scale: float = 0.7
    """Smallest share of the image's area that a random crop keeps."""
    repeated_augmentation: int = 1
    """How often an image is in a batch, augmented differently each time; an epoch then has so many fewer images."""
    hflip: float = 0.5
    """Probability of mirroring an image."""
    amp: bool = True
    """Mixed precision where the device has it: bfloat16, or float16 with scaled gradients."""
    micro_batch: int = 0
    """Most images a worker takes at once; of a larger share it sums the gradients of several parts. 0: all of its
    share, but with fewer workers than there may be no more than with those."""
    compile: bool = False
    """Train the model as torch.compile makes it; needs a compiler."""
    recompute_activations: bool = False
    """Keep the activations between blocks only and compute the others again (activation checkpointing): less memory,
    about a third more time."""
