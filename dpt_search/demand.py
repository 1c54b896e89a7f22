"""What a search asks of a cluster that grows and shrinks, and how much room that cluster has just now."""

from __future__ import annotations

import time
from collections.abc import Callable
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

    def __init__(
        self,
        wanted: dict[str, float],
        most: int,
        leaves: Callable[[int], int] | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            wanted: Ray resources of one worker.
            most: workers that are of use at a time.
            leaves: returns how many workers a probe that is under way leaves of those that there is room for.
            look: called before a cluster's nodes are counted; refuses new ones that cannot be used.
        """
        self._wanted, self._most, self._leaves, self._look = wanted, most, leaves, look
        self._waiting: list[Any] = []
        self._looked, self._free = -LOOKED, 0

    def __enter__(self) -> Demand:
        return self

    def __exit__(self, *_: object) -> None:
        self._ask(0)

    def room(self, left: int) -> int:
        """Return how many workers there may be now: at least one, but where a probe has all the room or waits for it.

        Workers that are lacking are asked for.

        Args:
            left: workers that are of use from now on, those that run counted.
        """
        if not is_cluster() and self._leaves is None:
            return self._most
        if time.monotonic() - self._looked >= LOOKED:
            self._free = self._count(left) if is_cluster() else self._count_here()
            self._looked = time.monotonic()
        return min(self._most, self._free)

    def wait(self, left: int) -> None:
        """Wait until a probe leaves room for a worker: Tune fails where its first trial is long in coming."""
        while not self.room(left):
            time.sleep(LOOKED)

    def _count(self, left: int) -> int:
        self._look()
        held = capacity(self._wanted)
        # Where there is no node yet, a trial or the probe asks for the first one itself.
        self._ask(max(0, min(self._most, left) - max(1, held)))
        least = max(1, held)
        return least if self._leaves is None else self._leaves(least)

    def _count_here(self) -> int:
        """Return the room on this machine; what the user wants beyond that may wait, but not with the probe."""
        held = capacity(self._wanted)
        free = held if self._leaves is None else self._leaves(held)
        return free if free < held else self._most

    def _ask(self, lacking: int) -> None:
        from ray.util.placement_group import placement_group, remove_placement_group

        waiting = [each for each in self._waiting if not each.wait(0)][:lacking]
        for each in self._waiting:
            if each not in waiting:
                remove_placement_group(each)
        self._waiting = waiting + [placement_group([self._wanted]) for _ in range(lacking - len(waiting))]
