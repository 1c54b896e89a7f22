"""The Ray Tune Trainable around a trial: one step is one epoch. Importing it imports no torch."""

from __future__ import annotations

import importlib
import math
import time
from typing import TYPE_CHECKING, Any

from ray import tune

from search_spaces.plan import PruningPlan
from trainables.locations import write_bytes

if TYPE_CHECKING:
    from trainables.tasks import TrialTask
    from trainables.trial import Trial
    from trainables.workspace import Workspace


class PruningTrial(tune.Trainable):
    """A trial as Tune runs it; its actor is reused, with the dense model and the images kept.

    The configuration is `{"trial": number, "plan": text, "seed": seed}`; what all trials share comes as `task`.
    Results have `accuracy`, `epoch`, `done`, `error` (empty while all is well) and the record so far
    (`removed_accuracy`, `accuracies`, `cost`, ...).
    """

    def setup(self, config: dict[str, Any], task: TrialTask) -> None:
        """Take the trial of `config`; the dense model and the images are loaded with its first step."""
        self._task = task
        self._workspace: Workspace | None = None
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self._config, self._start = config, time.monotonic()
        self._trial: Trial | None = None

    def step(self) -> dict[str, Any]:
        """Train one epoch; a trial that fails says why in `error` and is done."""
        try:
            trial = self._running()
            record = trial.step()
        except Exception as error:  # whatever it is, it is the trial's end and has to be in its record
            if self._task.device != "cpu" and isinstance(error, RuntimeError):
                # An accelerator may be unusable to this process after an error of its own: let the process go.
                write_bytes(error_location(self._task, self._config["trial"]), _one_line(error).encode())
                raise
            return {"accuracy": math.nan, "done": True, "error": _one_line(error)}
        spent = time.monotonic() - self._start
        if self._task.timeout and spent > self._task.timeout and not trial.done:
            return {
                "accuracy": math.nan,
                "done": True,
                "error": f"ran longer than {self._task.timeout:.0f} s",
                **record,
            }
        return {"accuracy": record["accuracies"][-1], "done": trial.done, "error": "", **record}

    def _running(self) -> Trial:
        """Return the trial, begun if it is not."""
        if self._workspace is None:
            module = importlib.import_module("trainables.workspace")
            self._workspace = module.Workspace(self._task, drop_path=self._task.recipe.drop_path)
        if self._trial is None:
            module = importlib.import_module("trainables.trial")
            plan = PruningPlan.parse(self._config["plan"])
            self._trial = module.Trial(self._workspace, self._task, self._config["trial"], plan, self._config["seed"])
        return self._trial

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the trial's state into a folder of Tune's."""
        self._running().save(f"{checkpoint_dir}/state.pt")

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on from a state in a folder of Tune's."""
        self._running().restore(f"{checkpoint_dir}/state.pt")

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial with the same actor."""
        self._begin(new_config)
        return True


def error_location(task: TrialTask, number: int) -> str:
    """Return where a trial whose process has to go leaves the reason."""
    return f"{task.checkpoints}/{number:06d}.error.txt"


def _one_line(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"
