"""What a search asks of a cluster that grows and shrinks, and how much room that cluster has just now."""

from __future__ import annotations

import time
from typing import Any

from dpt_search.remote import capacity, is_cluster

LOOKED = 1.0
"""Seconds for which the cluster is taken to be as it was."""


class Demand:
    """Tells a cluster's autoscaler how many workers a search could use, by reservations that wait.

    A reservation that is given room shows that there is some, so it is taken back at once and leaves it to a trial.
    All go with the driver, however that ends: nothing keeps nodes that nobody uses. On a cluster that cannot grow they
    wait, and take nothing. Left as a context, it asks for nothing any more.
    """

    def __init__(self, wanted: dict[str, float], most: int) -> None:
        """
        Args:
            wanted: Ray resources of one worker.
            most: workers that are of use at a time.
        """
        self._wanted, self._most = wanted, most
        self._waiting: list[Any] = []
        self._looked, self._held = -LOOKED, 0

    def __enter__(self) -> Demand:
        return self

    def __exit__(self, *_: object) -> None:
        self._ask(0)

    def room(self, left: int) -> int:
        """Return how many workers there may be now, at least one; ask for those that are lacking.

        Args:
            left: workers that are of use from now on, those that run counted.
        """
        if not is_cluster():
            return self._most
        if time.monotonic() - self._looked >= LOOKED:
            self._held = capacity(self._wanted)
            self._ask(max(0, min(self._most, left) - self._held))
            self._looked = time.monotonic()
        return max(1, min(self._most, self._held))

    def _ask(self, lacking: int) -> None:
        from ray.util.placement_group import placement_group, remove_placement_group

        waiting = [each for each in self._waiting if not each.wait(0)][:lacking]
        for each in self._waiting:
            if each not in waiting:
                remove_placement_group(each)
        self._waiting = waiting + [placement_group([self._wanted]) for _ in range(lacking - len(waiting))]
