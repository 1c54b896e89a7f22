"""One line for every trial and every epoch, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dpt_search.allowance import Allowance
from dpt_search.observed import ended
from dpt_search.store import Finished, Proposed, RunStore, TrialLog
from search_spaces.plan import PruningPlan


class TrialLines:
    """Says how each trial ended, and which go on elsewhere."""

    def __init__(
        self,
        say: Callable[[str], None],
        log: TrialLog,
        max_trials: int,
        concurrent: int,
        allowance: Allowance | None = None,
    ) -> None:
        self._say, self._log, self._allowance = say, log, allowance
        self._all = max_trials if allowance is None else allowance.most
        self._start, self._before = time.monotonic(), self._done
        done = f", {len(ended(log))} done before" if ended(log) else ""
        until = f"{max_trials} trials" if allowance is None else f"until the cost is {allowance.told(self._all)}"
        say(f"search: {until}{done}, {concurrent} at a time")

    @property
    def _done(self) -> float:
        """Trials that ended, or what was paid, where that ends the search."""
        trials = ended(self._log)
        return len(trials) if self._allowance is None else self._allowance.spent(trials)

    def ended(self, record: Finished) -> None:
        """Say how one trial ended and how long the rest will take."""
        done = self._done
        pace = (time.monotonic() - self._start) / max(1e-9, done - self._before)
        of = f"{done} of {self._all} done" if self._allowance is None else f"cost {self._allowance.told(done)}"
        left = f"{of}, {duration(pace * (self._all - done))} left"
        cell = PruningPlan.parse(record.plan).cell
        if record.accuracy is None:
            self._say(f"trial {record.trial} {cell}: failed: {record.error}; {left}")
            return
        path = " -> ".join(f"{a:.1%}" for a in [record.removed_accuracy or 0.0, *record.accuracies])
        self._say(f"trial {record.trial} {cell}: val {path}, {record.seconds:.0f} s; {left}")

    def lost(self, record: Proposed, with_node: bool) -> None:
        """Say that a trial lost its worker, alone or with the whole node, and goes on."""
        what = "its node" if with_node else "its worker"
        cell = PruningPlan.parse(record.plan).cell
        self._say(f"trial {record.trial} {cell}: {what} was lost; it goes on from its last epoch elsewhere")


class EpochLines:
    """Says how each epoch of a long fine-tune ended, as the workers record it."""

    def __init__(self, say: Callable[[str], None], store: RunStore, name: str, digest: str, epochs: int) -> None:
        self._say, self._store, self._name, self._digest, self._epochs = say, store, name, digest, epochs
        records = self._records()
        self._shown = records["saved"] if records else 0
        if records:
            # What comes after the newest state is done again.
            store.write_json(name, {**records, "epochs": records["epochs"][: self._shown]})
        if self._shown:
            say(f"going on after epoch {self._shown}")

    def done(self) -> int:
        """Return how many epochs are done and need not be done again."""
        return int(self._records().get("saved", 0))

    def show(self) -> None:
        """Say what has happened since the last call."""
        records = self._records().get("epochs", [])
        for record in records[self._shown :]:
            left = record["seconds"] * (self._epochs - record["epoch"])
            self._say(
                f"epoch {record['epoch']} of {self._epochs}: loss {record['loss']:.3f}, val {record['accuracy']:.1%}, "
                f"{record['images_per_second']:.0f} images/s; {duration(left)} left"
            )
        self._shown = max(self._shown, len(records))

    def _records(self) -> dict[str, Any]:
        """Return what the workers recorded of this training; nothing where there is none."""
        found: dict[str, Any] = self._store.read_json(self._name) or {}
        if found.get("inputs") != self._digest:
            return {}
        # Of versions that wrote a state after every epoch.
        return {"saved": len(found["epochs"]), **found}


def duration(seconds: float) -> str:
    """Return a length of time as a person says it."""
    if seconds < 90:
        return f"{max(0, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
