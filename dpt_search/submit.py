"""The program as a job on a Ray cluster: packed, submitted, followed, and ended with its own exit code."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dpt_search.config import BadConfig
from dpt_search.preflight import check_absolute
from dpt_search.remote import reach

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("dpt_search", "trainables", "search_spaces")
STOP_SECONDS = 20
"""How long a job has to end in order once it is told to stop; Ray's own limit is 3."""
INTERRUPTED = 130
HERE = "http://127.0.0.1:8265"
PORTS = {"http": 80, "https": 443}
LOST_SECONDS = 120.0
"""How long a job server that no longer answers is tried again."""


def connect(address: str) -> JobSubmissionClient:
    """Return a client of a cluster's job server.

    Args:
        address: its URL; empty: as RAY_API_SERVER_ADDRESS or RAY_ADDRESS name it, else this machine's.

    Raises:
        BadConfig: nothing answers there.
    """
    if address:
        address = address if "://" in address else f"http://{address}"
    named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or HERE
    # Ray lets this variable win over what it is told.
    os.environ["RAY_API_SERVER_ADDRESS"] = named
    advice = "give --address http://HEAD:8265, the address of the cluster's dashboard"
    try:
        if named != "auto":
            parts = urlsplit(named if "://" in named else f"//{named}")
            # Of an address where nobody is Ray would tell after minutes only, or never.
            reach(parts.hostname or "", parts.port or PORTS.get(parts.scheme, 0))
    # A port that is no number is a ValueError.
    except (OSError, ValueError) as error:
        raise BadConfig(f"no job server of Ray answers at {named} ({error}): {advice}") from None
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient()
    except AuthenticationError as error:
        raise BadConfig(f"the cluster wants a token: {_one_line(error)}") from None
    # Ray raises much else, such as errors of requests, for an address that is none of a job server.
    except Exception as error:
        raise BadConfig(f"no job server of Ray answers at {named} ({_one_line(error)}): {advice}") from None


def submit(client: JobSubmissionClient, argv: list[str], folder: Path) -> str:
    """Submit a job, and return its id.

    Args:
        client: of the cluster.
        argv: verb and options of the program.
        folder: what goes with the job; Ray keeps what it was given before, by content.

    Raises:
        BadConfig: it is too large.
        RuntimeError: the cluster refused it.
    """
    command = shlex.join(["python", "-m", "dpt_search", *argv])
    needs = {"working_dir": str(folder), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
    try:
        return str(client.submit_job(entrypoint=command, runtime_env=needs))
    except ValueError as error:
        raise BadConfig(f"what goes with the job cannot be packed ({_one_line(error)})") from None


def packed(argv: list[str], pack: Sequence[str], folder: Path) -> list[str]:
    """Put what a job needs into a folder: these packages, its configuration, and what the user names.

    Args:
        argv: verb and options of the program.
        pack: further files and folders, such as the module of `data.factory`.
        folder: an empty one.

    Returns:
        The arguments, with the configuration's path as it is in the folder.

    Raises:
        BadConfig: a file is not there, or two have the same name, or the run directory would go with the job.
    """
    source = Path(__file__).parents[1]
    for package in PACKAGES:
        shutil.copytree(source / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in pack:
        _add(Path(name).expanduser(), folder, f"--pack {name}")
    argv = list(argv)
    check_absolute(_run_dir(argv))
    for position, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag != "--config":
            continue
        if not equals and position + 1 < len(argv):
            argv[position + 1] = _config(argv[position + 1], folder)
        elif equals:
            argv[position] = f"--config={_config(value, folder)}"
    return argv


def _run_dir(argv: list[str]) -> str:
    """Return what `--run-dir` names, or nothing where it is not given."""
    flags = ("--run-dir", "--run_dir")
    given = [value for flag, value in zip(argv, [*argv[1:], ""], strict=True) if flag in flags]
    return (given or [each.partition("=")[2] for each in argv if each.partition("=")[0] in flags] or [""])[0]


def _config(value: str, folder: Path) -> str:
    # The configuration itself, or one that the job can read from where it is.
    if value.lstrip().startswith("{") or "://" in value:
        return value
    return _add(Path(value).expanduser(), folder, f"--config {value}")


def _add(path: Path, folder: Path, what: str) -> str:
    name = path.resolve().name
    if not path.exists():
        raise BadConfig(f"{what} is not there: name a file or folder of this machine")
    if (folder / name).exists():
        raise BadConfig(f"{what} has the name of something else that goes with the job: rename it")
    if path.is_dir():
        shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".git", ".venv"))
    else:
        shutil.copyfile(path, folder / name)
    return name


class Following:
    """One job's log, shown as it grows, and the job's end."""

    def __init__(self, client: JobSubmissionClient, job: str, show: Callable[[str], None]) -> None:
        """
        Args:
            client: of the cluster.
            job: its id.
            show: prints text as it is.

        Raises:
            BadConfig: there is no such job.
        """
        self._client, self._job, self._show = client, job, show
        self._shown = 0
        try:
            client.get_job_info(job)
        except RuntimeError as error:
            if "404" not in str(error):
                raise
            raise BadConfig(f"the cluster has no job {job!r}: `ray job list` names those it has") from None

    def until_its_end(self) -> int:
        """Show the log until the job has ended.

        Returns:
            The driver's own exit code; 130 where the job was stopped, 1 where it could not be started or was lost.

        Raises:
            OSError: the job server was not reached for long.
        """
        from aiohttp import ClientError

        heard = time.monotonic()
        while True:
            try:
                info = self._client.get_job_info(self._job)
                asyncio.run(self._tail())
                heard = time.monotonic()
                if info.status.is_terminal():
                    return self._exit_code(info)
            except (OSError, ClientError) as error:
                if time.monotonic() - heard > LOST_SECONDS:
                    raise OSError(_one_line(error)) from None
            # A connection that was lost, or a job whose end is not recorded yet.
            time.sleep(0.5)

    def stop(self) -> None:
        """Stop the job, and show the rest of its log."""
        self._client.stop_job(self._job)
        self.until_its_end()

    async def _tail(self) -> None:
        """Show what was not shown yet until the log ends, or the connection: each connection begins at its begin."""
        position = 0
        async with aclosing(self._client.tail_job_logs(self._job)) as chunks:
            with suppress(RuntimeError):
                async for text in chunks:
                    new = text[max(0, self._shown - position) :]
                    position += len(text)
                    self._shown = max(self._shown, position)
                    if new:
                        self._show(new)

    def _exit_code(self, info: Any) -> int:
        code: int | None = info.driver_exit_code
        if code is not None:
            # Of a driver that a signal ended, as a shell tells it.
            return code if code >= 0 else 128 - code
        if info.status.value == "STOPPED":
            return INTERRUPTED
        self._show(f"{_one_line(info.message or 'the job ended with no word')}\n")
        return 1


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
