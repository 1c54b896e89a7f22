"""Trials whose worker was lost: which go on elsewhere, and which have failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune

MOST_LOSSES = 2
"""How often a trial whose worker was lost is begun again without having come an epoch further."""


class Losses:
    """Counts the workers that each trial lost by its own doing, such as too much memory, since its newest epoch.

    A node that went, because it was preempted or broke, takes its trials with it through no fault of theirs.
    """

    def __init__(self) -> None:
        self._counted: dict[int, int] = {}

    def progress(self, trial: int) -> None:
        """Note that a trial came an epoch further."""
        self._counted.pop(trial, None)

    def is_final(self, trial: int, with_node: bool) -> bool:
        """Note that a trial lost its worker, alone or with the whole node; say whether it has failed for good."""
        if not with_node:
            self._counted[trial] = self._counted.get(trial, 0) + 1
        return self._counted.get(trial, 0) > MOST_LOSSES


class LossCallback(tune.Callback):
    """Tells of every trial whose worker was lost, and whether its node went too.

    Tune tells a searcher that a trial ended in an error, but not in which; it calls this right after.
    """

    def __init__(self, lost: Callable[[str, bool], None]) -> None:
        """
        Args:
            lost: called with Tune's name of the trial, and whether its node went.
        """
        self._lost = lost

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any) -> None:
        """Read the error from the file that Tune has just written."""
        place = trial.pickled_error_file
        error = cloudpickle.loads(Path(place).read_bytes()) if place and Path(place).exists() else None
        self._lost(trial.trial_id, is_loss_of_node(error))


def is_loss_of_node(error: Any) -> bool:
    """Say whether an error of Ray's means that a whole node went, or cannot be reached any more."""
    import ray
    from ray.exceptions import ActorUnavailableError, RayActorError

    if not isinstance(error, RayActorError):
        return False
    # Of a worker that ended alone its node tells at once; where nobody tells anything, the node does not answer either.
    if error.preempted or isinstance(error, ActorUnavailableError):
        return True
    return any(node["NodeID"] in str(error) for node in ray.nodes() if not node["Alive"])
