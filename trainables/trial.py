"""One trial: a plan removed from the dense model and fine-tuned briefly on the search subset. No Ray in here.

After every epoch its state is in the run directory, so that whoever starts the trial again goes on from there.
"""

from __future__ import annotations

import time
from typing import Any

import safetensors.torch
import torch

from search_spaces.plan import PruningPlan
from trainables.checkpoints import load_state, save_state
from trainables.devices import describe
from trainables.engine import Training, evaluate
from trainables.locations import write_bytes
from trainables.tasks import TRAINING_FORWARDS, TrialTask
from trainables.timing import count_macs
from trainables.workspace import Workspace, versions


class Trial:
    """A running trial; `step` trains one epoch and returns the record so far."""

    def __init__(self, workspace: Workspace, task: TrialTask, number: int, plan: PruningPlan, seed: int) -> None:
        """Prune, measure the accuracy right after removal, or go on from the state in the run directory."""
        self._workspace, self._task, self._number, self._plan = workspace, task, number, plan
        self._train = workspace.images("train", task.data.subset)
        self._val = workspace.images("val", task.data.val_limit)
        model, fade = workspace.to_train(plan, task.start, PruningPlan.parse(task.start_plan))
        macs = count_macs(model, workspace.view.input_size)
        teacher = workspace.dense if task.recipe.distillation != "none" else None
        teacher_macs = count_macs(teacher, workspace.view.input_size) if teacher is not None else 0.0
        self._training = Training(
            model, self._train, task.recipe, device=workspace.device, seed=seed, teacher=teacher,
            workers=task.data.workers, fade=fade,
        )  # fmt: skip
        self._macs = macs
        self._image_cost = TRAINING_FORWARDS * macs + teacher_macs
        self.location = f"{task.checkpoints}/{number:06d}.pt"
        self._record: dict[str, Any] = {
            "plan": str(plan),
            "removed_accuracy": None,
            "accuracies": [],
            "cost": 0.0,
            "seconds": 0.0,
            "device": describe(workspace.device),
            "versions": versions(),
        }
        self._resume()

    @property
    def done(self) -> bool:
        """Whether all epochs are trained."""
        return self._training.epochs_done >= self._task.recipe.epochs

    def step(self) -> dict[str, Any]:
        """Train one epoch, evaluate on val, write the state; a trial that is done trains no further.

        Returns:
            The trial's record so far: removed_accuracy, accuracies by epoch, cost, seconds, device, versions.

        Raises:
            Diverged: the loss is not finite.
        """
        if not self.done:
            start = time.perf_counter()
            if self._record["removed_accuracy"] is None:
                removed = self._workspace.pruned(self._plan, self._task.start)
                macs = count_macs(removed, self._workspace.view.input_size)
                self._record["removed_accuracy"] = self._evaluate(removed, macs)
            epoch = self._training.run_epoch()
            self._record["cost"] += epoch.images * self._image_cost
            self._record["accuracies"].append(self._evaluate(self._training.result, self._macs))
            self._record["seconds"] += time.perf_counter() - start
            self.save()
        return {**self._record, "accuracies": list(self._record["accuracies"]), "epoch": self._training.epochs_done}

    def _evaluate(self, model: torch.nn.Module, macs: float) -> float:
        self._record["cost"] += len(self._val) * macs
        right = evaluate(
            model, self._val, self._workspace.device, amp=self._task.recipe.amp, workers=self._task.data.workers
        )
        return float(right.mean())

    def write_weights(self, location: str) -> None:
        """Write the weights as a dense model's, for a trial that removes the same units and more to start from.

        The removed units have those of the dense model, as that trial does without them.
        """
        own = self._workspace.weights(self._training.result, self._plan)
        dense = self._workspace.dense.state_dict()
        whole = {name: own.get(name, tensor).contiguous() for name, tensor in dense.items()}
        write_bytes(location, safetensors.torch.save(whole))

    def save(self, location: str | None = None) -> None:
        """Write the state; to the run directory when no other place is named."""
        save_state(location or self.location, {"training": self._training.state_dict(), "record": self._record})

    def restore(self, location: str) -> None:
        """Go on from a state."""
        state = load_state(location)
        if state is not None and state["record"]["plan"] == str(self._plan):
            self._training.load_state_dict(state["training"])
            self._record = state["record"]

    def _resume(self) -> None:
        self.restore(self.location)
