"""Is the dense model worth pruning? Its accuracy on val, against chance, before anything is paid for."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from search_spaces import offered
from trainables.data import carved_splits, split_sizes
from trainables.dense import BadModel
from trainables.devices import describe
from trainables.engine import evaluate
from trainables.intervals import accuracy_interval
from trainables.tables import open_tables
from trainables.tasks import Task
from trainables.workspace import Workspace


def check_model(task: Task) -> dict[str, Any]:
    """Build the dense model and open the data: whatever is wrong with either shows here, at once.

    Returns:
        The removable units of each kind, and as `refused` why others are none, each reason once.
    """
    workspace = Workspace(task)
    # First of all: a device that cannot be used is told before anything is opened.
    _ = workspace.device
    offer = offered(workspace.dense)
    for split, table in open_tables(task.data).items():
        workspace.check_labels(table.labels, split)
    for split in ("train", "val"):
        workspace.images(split, 64)
    return {"attn": list(offer.attn), "act": list(offer.act), "refused": list(dict.fromkeys(offer.refused.values()))}


def check_dense(task: Task) -> dict[str, Any]:
    """Evaluate the dense model on val.

    Returns:
        Accuracy with its interval, images, classes, chance (share of the largest class), the images of every split of
        a search, and the splits that were carved out of the training images.

    Raises:
        BadModel: the accuracy is not clearly above chance.
    """
    workspace = Workspace(task)
    val = workspace.images("val", task.data.val_limit)
    chance = float(np.bincount(val.labels).max() / len(val))
    found = accuracy_interval(evaluate(workspace.dense, val, workspace.device))
    # Twice chance for many classes; a tenth of the way to perfect for few.
    if found["low"] <= min(2 * chance, chance + 0.1 * (1 - chance)):
        raise BadModel(
            f"the dense model's accuracy on val is {found['accuracy']:.1%} and chance is {chance:.1%}, so there is "
            "nothing to prune: check the order of the labels, data.mean and data.std, and model.checkpoint, or train "
            "it on this data first with --adapt-epochs"
        )
    return {
        **found,
        "images": len(val),
        "classes": cast(int, workspace.dense.num_classes),
        "chance": chance,
        "device": describe(workspace.device),
        "splits": split_sizes(task.data, task.seed),
        "carved": carved_splits(task.data),
    }
