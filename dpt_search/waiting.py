"""A line that says why nothing runs, when nothing has for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from dpt_search.holdings import Holdings, holdings
from dpt_search.progress import duration

FIRST_SECONDS = 30.0
LAST_SECONDS = 600.0
LOOK_SECONDS = 5.0


class Waiting:
    """Watches one wait: what is wanted, and whether it has room yet."""

    def __init__(
        self, say: Callable[[str], None], wanted: Mapping[str, float], look: Callable[[], Holdings] = holdings
    ) -> None:
        """
        Args:
            say: prints a line.
            wanted: Ray resources of what is to run.
            look: returns what the cluster holds.
        """
        self._say, self._wanted, self._look = say, wanted, look
        self.runs()

    def runs(self) -> None:
        """Note that something runs: the wait is over, or has not begun."""
        self._since = self._looked = time.monotonic()
        self._next = FIRST_SECONDS

    def look(self) -> None:
        """Say why nothing runs, if it is time to; called often. Lines become ever more seldom."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        try:
            held = self._look()
        # A control store that does not answer just now is no end of what may well run.
        except Exception:
            return
        if not held.waits(self._wanted):
            self.runs()
        elif now - self._since >= self._next:
            self._say(f"nothing has run for {duration(now - self._since)}: {held.told(self._wanted)}")
            self._next = min(2 * self._next, self._next + LAST_SECONDS)
