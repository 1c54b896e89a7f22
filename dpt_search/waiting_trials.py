"""The line that says why no trial runs, as a callback of Ray Tune's."""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from dpt_search.waiting import Waiting


class WaitingTrials(tune.Callback):
    """Looks, whenever Tune does, whether any trial runs."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting

    def on_step_begin(self, iteration: int, trials: list[Trial]) -> None:
        """Say why nothing runs, if nothing has for a while."""
        if any(trial.status == Trial.RUNNING for trial in trials):
            self._waiting.runs()
        elif trials:
            self._waiting.look()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for its own restore, which is not used."""
        return {}
