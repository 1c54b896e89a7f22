"""The run directory: immutable records, written whole, on a local disk or any pyarrow.fs URI.

What lies where is described in docs/architecture.md. State is the trial log, nothing else: every search is rebuilt from
`trials/`, and nothing pickled is read back.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pyarrow import fs

from search_spaces import BadInput
from trainables.locations import resolve, write_bytes


class BadRun(BadInput):
    """The run directory cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Proposed:
    """A trial that was decided on, recorded before it is submitted.

    Attributes:
        trial: its number, from 0.
        plan: text form of the plan.
        start: what its weights start from.
        seed: the trial's seed.
        seen: number of observations the sampler had seen.
        sampler: who proposed it.
        params: what the sampler proposed, by parameter name.
        time: seconds since the epoch.
    """

    trial: int
    plan: str
    start: str
    seed: int
    seen: int
    sampler: str
    params: dict[str, int]
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Finished:
    """How a trial ended.

    Attributes:
        trial: its number.
        plan: text form of the plan.
        start: what its weights started from.
        status: `finished` or `failed`.
        removed_accuracy: accuracy on val right after removal, before any training.
        accuracies: accuracy on val after every epoch.
        cost: images processed times MACs, training three times, teacher and evaluation counted.
        seconds: wall-clock seconds of the trial.
        device: the hardware's name.
        versions: of the libraries that matter.
        error: why it failed; empty otherwise.
        time: seconds since the epoch.
    """

    trial: int
    plan: str
    start: str
    status: str
    removed_accuracy: float | None = None
    accuracies: list[float] = field(default_factory=list)
    cost: float = 0.0
    seconds: float = 0.0
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    error: str = ""
    time: float = field(default_factory=time.time)

    @classmethod
    def of(cls, proposed: Proposed, result: dict[str, Any], error: str) -> Finished:
        """Make the record of a trial from what its worker returned; the trial failed where there is an error."""
        measured = ("removed_accuracy", "accuracies", "cost", "seconds", "device", "versions")
        return cls(
            proposed.trial, proposed.plan, proposed.start, "failed" if error else "finished", error=error,
            **{name: result[name] for name in measured if name in result},
        )  # fmt: skip

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the last epoch, for a trial that finished."""
        return self.accuracies[-1] if self.status == "finished" and self.accuracies else None


class RunStore:
    """Reads and writes one run directory."""

    def __init__(self, location: str) -> None:
        """
        Args:
            location: path or pyarrow.fs URI; need not be there yet.

        Raises:
            BadRun: its filesystem cannot be reached, or the URI has options.
        """
        self.location = location
        if "://" in location and "?" in location:
            # Names are put after it; the environment reaches every node's file system anyway.
            raise BadRun(
                f"run directory {location!r} has options after '?': leave them out and set them in the environment "
                "(such as AWS_ENDPOINT_URL and AWS_REGION)"
            )
        try:
            self._fs, self.root = resolve(location)
        except ValueError as error:
            raise BadRun(f"run directory: {error}") from None

    @property
    def is_local(self) -> bool:
        """Whether the directory is on a file system that this process mounts."""
        return isinstance(self._fs, fs.LocalFileSystem)

    def path(self, name: str) -> str:
        """Return where a file of the run is, as `location` is written."""
        return f"{self.root if self.is_local else self.location.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Say whether a file or folder is there."""
        return bool(self._fs.get_file_info(f"{self.root}/{name}").type != fs.FileType.NotFound)

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole: a reader sees the old one or the new one, never a part.

        Raises:
            BadRun: the directory cannot be written to.
        """
        try:
            write_bytes(self.path(name), content)
        except OSError as error:
            raise BadRun(
                f"cannot write to the run directory {self.location!r} ({_reason(error)}): choose another --run-dir"
            ) from None

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            FileNotFoundError: it is not there.
        """
        with self._fs.open_input_file(f"{self.root}/{name}") as stream:
            return bytes(stream.readall())

    def write_json(self, name: str, value: Any) -> None:
        """Write plain data as JSON."""
        self.write(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """Return plain data from JSON, or None when the file is not there.

        Raises:
            BadRun: the file is not JSON, or the directory cannot be read.
        """
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadRun(
                f"cannot read from the run directory {self.location!r} ({_reason(error)}): choose another --run-dir"
            ) from None
        except ValueError:
            raise BadRun(f"{self.path(name)} is not readable JSON: remove it to have it made again") from None

    def names(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder, sorted; empty when the folder is not there."""
        selector = fs.FileSelector(f"{self.root}/{folder}", allow_not_found=True)
        found = self._fs.get_file_info(selector)
        return sorted(PurePosixPath(f.path).name for f in found if f.type == fs.FileType.File)

    def delete_dir(self, name: str) -> None:
        """Delete a folder; nothing happens when it is not there."""
        if self.exists(name):
            self._fs.delete_dir(f"{self.root}/{name}")

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens when it is not there."""
        if self.exists(name):
            self._fs.delete_file(f"{self.root}/{name}")


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error).splitlines()[0]


class TrialLog:
    """The trials of a run: one immutable file per record, compacted every few hundred.

    Reading is idempotent: the same files give the same log, whatever order they were written in. Of several finished
    records of one trial the latest counts; a broken file is reported in `broken` and skipped.
    """

    COMPACT_AT = 300

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self.proposed: dict[int, Proposed] = {}
        self.finished: dict[int, Finished] = {}
        self.broken: list[str] = []
        # A file that went since it was listed was compacted by the driver: another file has its records now.
        for _ in range(3):
            if self._read_all():
                break

    def _read_all(self) -> bool:
        self.broken = []
        names = [name for name in self._store.names("trials") if name.endswith(".json")]
        # Compacted files first, so that a record's own file, if it is still there, has the last word.
        names.sort(key=lambda n: (not n.startswith("compacted"), n))
        gone = [name for name in names if not self._read(name)]
        return not gone

    def _read(self, name: str) -> bool:
        """Read one file; return whether it was there."""
        try:
            value = json.loads(self._store.read(f"trials/{name}"))
            records = value["records"] if name.startswith("compacted") else [value]
            for record in records:
                self._add(record)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            self.broken.append(f"{name}: {type(error).__name__}")
            return not isinstance(error, FileNotFoundError)
        return True

    def _add(self, record: dict[str, Any]) -> None:
        if "status" in record:
            self._end(Finished(**record))
        else:
            proposed = Proposed(**record)
            self.proposed[proposed.trial] = proposed

    def _end(self, record: Finished) -> None:
        known = self.finished.get(record.trial)
        if known is None or known.time <= record.time:
            self.finished[record.trial] = record

    def propose(self, record: Proposed) -> None:
        """Record a trial before it is submitted."""
        self.proposed[record.trial] = record
        self._store.write_json(f"trials/{record.trial:06d}-proposed.json", asdict(record))

    def finish(self, record: Finished) -> None:
        """Record a trial's end."""
        self._end(record)
        self._store.write_json(f"trials/{record.trial:06d}-finished-{record.time:.6f}.json", asdict(record))

    @property
    def unfinished(self) -> list[Proposed]:
        """Trials that were proposed and have no end yet, oldest first."""
        return [self.proposed[n] for n in sorted(self.proposed) if n not in self.finished]

    @property
    def next_trial(self) -> int:
        """The number of the next new trial."""
        return max([*self.proposed, *self.finished], default=-1) + 1

    def compact(self) -> None:
        """Put the records of finished trials into one file once there are many; the driver alone calls this."""
        names = self._store.names("trials")
        if len(names) < self.COMPACT_AT:
            return
        done = sorted(self.finished)
        records = [asdict(r) for n in done for r in _both(self.proposed.get(n), self.finished[n])]
        # Named by what it holds; written before anything is deleted, so a crash between the two loses nothing.
        target = f"compacted-{len(done):06d}-{time.time():.0f}.json"
        self._store.write_json(f"trials/{target}", {"records": records})
        ended = {f"{n:06d}" for n in done}
        kept = {target, *(each.partition(":")[0] for each in self.broken)}
        for name in names:
            if name not in kept and (name.startswith("compacted") or name.split("-")[0] in ended):
                self._store.delete(f"trials/{name}")


def _both(proposed: Proposed | None, finished: Finished) -> Iterable[Proposed | Finished]:
    return [finished] if proposed is None else [proposed, finished]
