"""What one node of a cluster is like, looked at before anything is paid for. Imports no torch."""

from __future__ import annotations

import importlib.util
import platform
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

from pyarrow import fs

from search_spaces import first_line
from trainables.locations import read_bytes, resolve, write_bytes
from trainables.settings import NAMED_DATA
from trainables.tasks import LookTask

PACKAGES = ("torch", "timm", "ray")
SEEN_WITHIN_SECONDS = 10.0
"""A shared file system such as NFS may show another host's new file only after a while."""


def look(task: LookTask) -> dict[str, Any]:
    """Look at this node as a worker of the run sees it.

    Args:
        task: where the run directory, the data and the weights are.

    Returns:
        Plain data: `host`, `versions`, as `run_dir` what is wrong with the run directory (empty where nothing is), and
        as `unread` a text for everything that cannot be read.
    """
    unread = (_read_problem(what, place) for what, place in _places(task))
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "run_dir": _run_dir_problem(task),
        "unread": [text for text in unread if text],
    }


def versions() -> dict[str, str]:
    """Return the versions that must be the same on every node, without what says how a package was built."""
    found = {name: version.partition("+")[0] for name, version in installed(PACKAGES).items()}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **found}


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those of some packages that are installed here."""
    found = {}
    for package in packages:
        # A checkout that was not installed, or a driver that needs no torch.
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def sees(location: str, content: bytes) -> bool:
    """Say whether a file has this content, waiting for a while until it has."""
    end = time.monotonic() + SEEN_WITHIN_SECONDS
    while True:
        try:
            if read_bytes(location) == content:
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.5)


def _run_dir_problem(task: LookTask) -> str:
    try:
        write_bytes(f"{task.folder}/{task.node}", task.token.encode())
    except (OSError, ValueError) as error:
        return f"cannot write to it ({first_line(error)})"
    try:
        shared = sees(f"{task.folder}/driver", task.token.encode())
    except OSError as error:
        return f"cannot read from it ({first_line(error)})"
    return "" if shared else f"does not see what the driver, on {task.driver}, writes there"


def _places(task: LookTask) -> list[tuple[str, str]]:
    places = []
    if task.data.path and task.data.path not in NAMED_DATA:
        places.append(("data.path", task.data.path))
    if task.model.checkpoint not in ("", "pretrained"):
        places.append(("model.checkpoint", task.model.checkpoint))
    if task.data.factory:
        places.append(("data.factory", task.data.factory))
    return places


def _read_problem(what: str, place: str) -> str:
    if what == "data.factory":
        module = place.rpartition(".")[0]
        try:
            found = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
        return "" if found else f"has no module {module!r}, which data.factory names"
    try:
        filesystem, path = resolve(place)
        info = filesystem.get_file_info(path)
        is_folder = info.type == fs.FileType.Directory
        # A folder that another one is to be mounted on is there, and empty.
        if info.type == fs.FileType.NotFound or (is_folder and not filesystem.get_file_info(fs.FileSelector(path))):
            return f"has nothing at {what} {place!r}"
        if not is_folder:
            with filesystem.open_input_file(path) as stream:
                stream.read(1)
    except (OSError, ValueError) as error:
        return f"cannot read {what} {place!r} ({first_line(error)})"
    return ""
