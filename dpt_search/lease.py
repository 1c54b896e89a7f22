"""One writer a run directory: a lease with a heartbeat."""

from __future__ import annotations

import _thread
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from dpt_search.store import BadRun, RunStore

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
SILENT_SECONDS = 35.0
"""A holder on another host that misses three beats while it is watched is taken to be dead."""
SETTLE_SECONDS = 0.2
"""Longer than it takes from reading a free lease to writing one's own."""
LAST_BEAT_SECONDS = 2.0
"""How long a heartbeat that is being written is waited for when the process is told to end."""
END_SECONDS = 15.0
"""How long what is under way may take to end once the run is another's, or anybody's; then the process ends at once."""


class Lease:
    """Holds a run directory for this process while the context lasts.

    A lease is free again when its holder's heartbeat is older than `STALE_SECONDS`, or at once when the holder was a
    process of this host that is gone. One on another host, such as a pod that was replaced, is listened to for up to
    `SILENT_SECONDS`: the next driver of a killed one begins then. SIGTERM, which `ray job stop` and Kubernetes send
    shortly before they kill, gives the lease up at once and then ends the program as Ctrl-C does. If something swallows
    that interrupt, the process is ended after `END_SECONDS`: without the lease it must not go on.

    Raises (on entering):
        BadRun: another driver holds the run, naming it.
    """

    NAME = "lease.json"

    def __init__(self, store: RunStore, lost: Callable[[], None] = _thread.interrupt_main) -> None:
        """
        Args:
            store: the run directory.
            lost: called once from another thread when a later driver has taken the lease.
        """
        self._store, self._lost = store, lost
        self._id = uuid.uuid4().hex
        self._stop, self._left = threading.Event(), threading.Event()
        self._before: Any = None
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Lease:
        holder = self._store.read_json(self.NAME)
        if holder is not None and _is_alive(holder) and not self._falls_silent(holder):
            raise BadRun(
                f"run directory {self._store.location!r} is in use by process {holder['pid']} on {holder['host']} "
                f"(started {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(holder['started']))}): wait for it or "
                "choose another --run-dir"
            )
        self._started = time.time()
        self._write()
        # Of two that started at once the later write wins: both have written by the time they look again.
        time.sleep(SETTLE_SECONDS)
        if not self._is_ours():
            raise BadRun(f"another driver took the run directory {self._store.location!r} at this moment")
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        self._left.set()
        self._stop.set()
        self._thread.join()
        self._give_up()

    def _falls_silent(self, holder: dict[str, Any]) -> bool:
        """Watch a holder on another host until its heart beats, or has not for long enough."""
        if holder["host"] == socket.gethostname():
            return False
        end = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, SILENT_SECONDS))
            now = self._store.read_json(self.NAME)
            if now is None:
                return True
            if (now["id"], now["heartbeat"]) != (holder["id"], holder["heartbeat"]):
                return False
        return True

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()
        self._thread.join(LAST_BEAT_SECONDS)
        # The run may not be reachable any more: the program ends all the same.
        with suppress(BadRun, OSError):
            self._give_up()
        threading.Thread(target=self._end_anyway, daemon=True).start()
        interrupt = signal.getsignal(signal.SIGINT)
        if callable(interrupt):
            # Not sent as a signal: in a job of Ray's SIGINT is blocked.
            interrupt(number, frame)
        raise KeyboardInterrupt

    def _end_anyway(self) -> None:
        """End the process, as an interrupt would, unless the context is left soon: Ray, or Tune, may swallow one."""
        if not self._left.wait(END_SECONDS):
            os._exit(130)

    def _give_up(self) -> None:
        if self._is_ours():
            self._store.delete(self.NAME)

    def _is_ours(self) -> bool:
        """Say whether nobody took the lease, which happens to a process that slept for long."""
        holder = self._store.read_json(self.NAME)
        return holder is not None and holder["id"] == self._id

    def _write(self) -> None:
        self._store.write_json(
            self.NAME,
            {
                "id": self._id,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": self._started,
                "heartbeat": time.time(),
            },
        )

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            # A beat that a full disk or a lost connection swallows is no end: the next one may come through.
            with suppress(BadRun):
                if not self._is_ours():
                    # Another driver writes now: this one must not.
                    self._lost()
                    self._end_anyway()
                    return
                self._write()


def _is_alive(holder: dict[str, float | str | int]) -> bool:
    if time.time() - float(holder["heartbeat"]) > STALE_SECONDS:
        return False
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
