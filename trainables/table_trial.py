"""A trial of `tabulate`: what a trial of the search does, with no Tune around it. No Ray in here."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from search_spaces import BadInput
from search_spaces.plan import PruningPlan
from trainables.tasks import TrialTask
from trainables.trial import Trial
from trainables.workspace import Workspace

_workspaces: dict[str, Workspace] = {}
"""This process's workspace, by task: the dense model and the images are loaded once."""
_unusable: list[str] = []
"""Errors of an accelerator, after which this process may not be able to use it."""


def run_trial(task: TrialTask, number: int, plan: str, seed: int, weights: str = "") -> dict[str, Any]:
    """Train all epochs of one trial.

    Args:
        task: what all trials share.
        number: names the trial's state in `task.checkpoints`.
        plan: text form of what is removed.
        seed: of order, augmentation and drop-path.
        weights: place or URI for what the trial came to; empty for none.

    Returns:
        The trial's record, with `images` by split, and `error`: empty, or in one line why the trial failed.

    Raises:
        BadInput: the model or the data cannot be used, by any trial.
    """
    if _unusable:
        # Ray gives the trial to another process.
        os._exit(1)
    workspace = _workspace(task)
    images = {"train": len(workspace.images("train", task.data.subset))}
    images["val"] = len(workspace.images("val", task.data.val_limit))
    try:
        trial = Trial(workspace, task, number, PruningPlan.parse(plan), seed)
        # One that had been trained to its end, by a process that was lost before it could say so, only tells.
        record = trial.step()
        while not trial.done:
            record = trial.step()
        if weights:
            trial.write_weights(weights)
    except BadInput:
        raise
    except (ValueError, ArithmeticError, RuntimeError) as error:
        if task.device != "cpu" and isinstance(error, RuntimeError):
            _unusable.append(str(error))
        return {"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}
    return {**record, "images": images, "error": ""}


def _workspace(task: TrialTask) -> Workspace:
    # Where a trial starts from and leaves its state is its own; the rest of the workspace is shared.
    key = repr(replace(task, start="", start_plan="", checkpoints=""))
    if key not in _workspaces:
        _workspaces.clear()
        _workspaces[key] = Workspace(task, drop_path=task.recipe.drop_path)
    return _workspaces[key]
