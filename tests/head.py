"""A head of a Ray cluster on this machine, with ports and a folder of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clusters import end, free_ports

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Head:
    """A head that is up.

    Attributes:
        address: of the control store, for RAY_ADDRESS.
        url: of the job server.
        env: for processes that use it.
        folder: of the sessions.
    """

    address: str
    url: str
    env: dict[str, str]
    folder: Path


@contextmanager
def ray_head(cpus: int = 2, **env: str) -> Iterator[Head]:
    """Start a head with a job server on 127.0.0.1, and end all its processes afterwards.

    Args:
        cpus: it has for trials.
        env: further variables of its processes, and so of the jobs that it runs.
    """
    # Short, because of the names of unix sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="dh", dir="/tmp"))
    gcs, dashboard, agent, client = free_ports(4)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Whether tokens are asked for would depend on what else ran here before.
    env = {**inherited, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **env}
    # `python` in the command of a job.
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    command = [
        BIN / "ray", "start", "--head", f"--port={gcs}", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", "--object-store-memory=100000000", f"--temp-dir={folder}",
    ]  # fmt: skip
    try:
        # Jobs find this package in what was sent with them, and nowhere else.
        own = {name: value for name, value in env.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, env=own, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        url = f"http://127.0.0.1:{dashboard}"
        await_answer(f"{url}/api/version")
        yield Head(f"127.0.0.1:{gcs}", url, env, folder)
    finally:
        end(folder.name)
        shutil.rmtree(folder, ignore_errors=True)


def await_answer(url: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} never answered")
