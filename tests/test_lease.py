"""One writer a run directory: a second one is refused by name, and nobody waits for the dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpt_search import lease
from dpt_search.lease import Lease
from dpt_search.store import BadRun, RunStore

HOLD = """
import sys
from dpt_search.lease import Lease
from dpt_search.store import RunStore
with Lease(RunStore(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run"))


@pytest.fixture
def other(store: RunStore) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run until its stdin is closed."""
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, store.location], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write_holder(store: RunStore, **values: object) -> None:
    now = time.time()
    holder = {"id": "other", "host": socket.gethostname(), "pid": os.getpid(), "started": now, "heartbeat": now}
    store.write_json(Lease.NAME, {**holder, **values})


def test_a_second_driver_is_refused_and_told_who_holds_the_run(store: RunStore, other: "subprocess.Popen[str]") -> None:
    with pytest.raises(BadRun) as caught, Lease(store):
        pass
    message = str(caught.value)
    assert f"process {other.pid} on {socket.gethostname()}" in message
    assert "another --run-dir" in message
    assert "\n" not in message
    assert store.read_json(Lease.NAME)["pid"] == other.pid


def test_the_run_is_free_once_its_driver_has_ended(store: RunStore, other: "subprocess.Popen[str]") -> None:
    other.communicate(timeout=30)
    assert store.read_json(Lease.NAME) is None
    with Lease(store):
        assert store.read_json(Lease.NAME)["pid"] == os.getpid()


def test_the_run_of_a_killed_driver_of_this_host_is_free_at_once(
    store: RunStore, other: "subprocess.Popen[str]"
) -> None:
    other.kill()
    other.wait(timeout=30)
    assert store.read_json(Lease.NAME)["pid"] == other.pid
    with Lease(store):
        assert store.read_json(Lease.NAME)["pid"] == os.getpid()


@pytest.fixture
def elsewhere(store: RunStore) -> Iterator[None]:
    """A driver on another host, whose heart beats."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.02):
            write_holder(store, host="elsewhere", pid=2**22 + 1)

    write_holder(store, host="elsewhere", pid=2**22 + 1)
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.usefixtures("elsewhere")
def test_a_driver_on_another_host_is_believed_while_its_heart_beats(store: RunStore) -> None:
    with pytest.raises(BadRun, match=f"process {2**22 + 1} on elsewhere"), Lease(store):
        pass
    assert store.read_json(Lease.NAME)["host"] == "elsewhere"


def test_the_run_of_a_killed_driver_of_another_host_is_free_once_it_was_silent_for_long(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.5)
    write_holder(store, host="elsewhere")
    start = time.monotonic()
    with Lease(store):
        assert time.monotonic() - start > 0.5
        assert store.read_json(Lease.NAME)["pid"] == os.getpid()


def test_a_driver_of_another_host_that_ends_while_it_is_watched_leaves_the_run_free(store: RunStore) -> None:
    write_holder(store, host="elsewhere")
    threading.Timer(0.3, store.delete, [Lease.NAME]).start()
    start = time.monotonic()
    with Lease(store):
        assert time.monotonic() - start < lease.SILENT_SECONDS / 2


@contextmanager
def holding(program: str, store: RunStore) -> Iterator["subprocess.Popen[str]"]:
    """Run a program that takes the lease of its argument and then says `held`."""
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", program, store.location], cwd=root, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


@pytest.mark.parametrize("blocked", [False, True])
def test_sigterm_gives_the_run_up_before_anything_else_and_ends_as_ctrl_c_does(store: RunStore, blocked: bool) -> None:
    """As in a job of Ray's, where SIGINT is blocked."""
    program = (
        "import signal, sys, time\n"
        f"if {blocked}: signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGINT}})\n"
        "from dpt_search.lease import Lease\n"
        "from dpt_search.store import RunStore\n"
        "store = RunStore(sys.argv[1])\n"
        "try:\n"
        "    with Lease(store):\n"
        "        try:\n"
        "            print('held', flush=True)\n"
        "            time.sleep(60)\n"
        "        finally:\n"
        "            print('free' if store.read_json(Lease.NAME) is None else 'held', flush=True)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
    )
    with holding(program, store) as process:
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == "free\ninterrupted\n"
    assert process.returncode == 0
    assert not store.exists(Lease.NAME)


@pytest.mark.parametrize("end", ["told to end", "overtaken"])
def test_a_driver_that_swallows_its_interrupt_ends_all_the_same(store: RunStore, end: str) -> None:
    program = (
        "import sys, time\n"
        "from dpt_search import lease\n"
        "from dpt_search.store import RunStore\n"
        "lease.END_SECONDS, lease.HEARTBEAT_SECONDS = 1.0, 0.1\n"
        "with lease.Lease(RunStore(sys.argv[1])):\n"
        "    for line in ('held', 'swallowed'):\n"
        "        try:\n"
        "            print(line, flush=True)\n"
        "            while True:\n"
        "                time.sleep(0.1)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
    )
    with holding(program, store) as process:
        if end == "told to end":
            process.send_signal(signal.SIGTERM)
        else:
            # A beat that was under way may come after it once.
            for _ in range(2):
                write_holder(store, host="elsewhere")
                time.sleep(0.5)
        try:
            assert process.communicate(timeout=30)[0] == "swallowed\n"
        finally:
            process.kill()
    assert process.returncode == 130
    held = store.read_json(Lease.NAME)
    assert held is None if end == "told to end" else held["host"] == "elsewhere"


@pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
def test_a_lease_without_a_heartbeat_for_long_is_taken_over(store: RunStore, host: str) -> None:
    write_holder(store, host=host, heartbeat=time.time() - lease.STALE_SECONDS - 1)
    with Lease(store):
        holder = store.read_json(Lease.NAME)
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
    assert not store.exists(Lease.NAME)


def test_a_refused_driver_leaves_the_holders_lease_as_it_was(store: RunStore, other: "subprocess.Popen[str]") -> None:
    before = store.read(Lease.NAME)
    with pytest.raises(BadRun), Lease(store):
        pass
    assert store.read(Lease.NAME) == before


def test_the_heart_beats_while_the_run_is_held_and_stops_after(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    with Lease(store):
        first = store.read_json(Lease.NAME)
        deadline = time.monotonic() + 20
        while store.read_json(Lease.NAME)["heartbeat"] == first["heartbeat"]:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.01)
        assert store.read_json(Lease.NAME)["started"] == first["started"]
    time.sleep(0.05)
    assert not store.exists(Lease.NAME)


def test_the_heart_goes_on_after_a_beat_that_could_not_be_written(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    with Lease(store):
        first, write, failures = store.read_json(Lease.NAME), store.write, []

        def fails_twice(name: str, content: bytes) -> None:
            if len(failures) < 2:
                failures.append(name)
                raise BadRun("no space left")
            write(name, content)

        store.write = fails_twice  # type: ignore[method-assign]
        deadline = time.monotonic() + 20
        while store.read_json(Lease.NAME)["heartbeat"] == first["heartbeat"]:
            assert time.monotonic() < deadline, "the heart stopped"
            time.sleep(0.01)
        assert len(failures) == 2


def test_a_driver_that_slept_does_not_take_the_run_back_from_its_next_holder(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    lost = threading.Event()
    with Lease(store, lost.set):
        # Another driver found the lease stale and took it; a beat that was under way may come after it once.
        for _ in range(2):
            write_holder(store, host="elsewhere")
            time.sleep(0.1)
        assert lost.wait(10)
        assert store.read_json(Lease.NAME)["host"] == "elsewhere"
    assert store.read_json(Lease.NAME)["host"] == "elsewhere"


def test_of_two_drivers_that_start_at_once_one_gives_way(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Lease(store)
    write = store.write

    def overtaken(name: str, content: bytes) -> None:
        write(name, content)
        write(name, json.dumps({**json.loads(content), "id": "other"}).encode())

    monkeypatch.setattr(store, "write", overtaken)
    with pytest.raises(BadRun, match="another driver took the run directory"), ours:
        pass
    assert store.read_json(Lease.NAME)["id"] == "other"


def test_an_error_in_the_run_releases_it(store: RunStore) -> None:
    with pytest.raises(KeyboardInterrupt), Lease(store):
        raise KeyboardInterrupt
    assert not store.exists(Lease.NAME)
