"""The options of `submit`, which stand before the verb of the job."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpt_search.options import Parser, parse, simple_parser
from search_spaces import BadInput

if TYPE_CHECKING:
    from dpt_search.submit import Following


def submission(argv: list[str], verbs: Sequence[str], show: Callable[[str], None]) -> int:
    """Read the options; submit a job or take up one that was submitted, and show its log until it ends.

    Args:
        argv: arguments after `submit`.
        verbs: what a job may do.
        show: prints text as it is.

    Returns:
        The exit code of the job's own driver; 0 with --no-wait, 130 when interrupted.

    Raises:
        BadInput: the options make no sense, or what they name is not there.
    """
    own, rest = _split(argv, verbs)
    given = parse(_parser(), own)
    if bool(given.follow) == bool(rest):
        raise BadInput(
            "name what the job is to do, as in `dpt-search submit run --config run.yaml`, or a job to --follow"
        )
    if rest and rest[0] not in verbs:
        raise BadInput(f"no verb {rest[0]!r}: use one of {', '.join(verbs)}")
    # Ray's client tells of every file that it packs.
    logging.disable(logging.WARNING)
    from dpt_search.submit import Following, connect, packed, submit

    with tempfile.TemporaryDirectory(prefix="dpt_search_job_") as folder:
        # What is wrong here shows before anybody is called.
        argv = packed(rest, given.pack, Path(folder)) if rest else []
        client = connect(given.address)
        job = given.follow or submit(client, argv, Path(folder))
    again = f"dpt-search submit --address {client.get_address()} --follow {job}"
    if not given.follow:
        show(f"submitted {job}; `{again}` follows it\n")
        if given.no_wait:
            return 0
    following = Following(client, job, show)
    try:
        return following.until_its_end()
    except KeyboardInterrupt:
        return _interrupted(following, show, "" if not given.follow else again)
    except OSError as error:
        raise RuntimeError(f"lost the job server ({error}); the job may go on: `{again}`") from None


def _interrupted(following: Following, show: Callable[[str], None], again: str) -> int:
    """Stop the job that was submitted here; leave one that is only watched."""
    from dpt_search.submit import INTERRUPTED

    if again:
        show(f"\nthe job goes on: `{again}` follows it, `ray job stop` stops it\n")
        return INTERRUPTED
    show("\nstopping the job\n")
    following.stop()
    show("the job was stopped; the same command goes on from here\n")
    return INTERRUPTED


def _split(argv: list[str], verbs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options of `submit`, and verb and options of the job: from the first verb on, or after `--`."""
    for position, argument in enumerate(argv):
        if argument == "--":
            return argv[:position], argv[position + 1 :]
        if argument in verbs:
            return argv[:position], argv[position:]
    return argv, []


def _parser() -> Parser:
    about = "Run a verb as a job on a Ray cluster, show its log, and end with its exit code. Ctrl-C stops the job."
    parser = simple_parser("submit", about)
    parser.usage = "dpt-search submit [options] VERB [options of VERB]"
    address = "The cluster's dashboard, http://HEAD:8265; left out: as RAY_API_SERVER_ADDRESS or RAY_ADDRESS say."
    parser.add_argument("--address", default="", help=address)
    parser.add_argument("--no_wait", action="store_true", help="Do not follow the job, only submit it.")
    follow = "Show the log of a job that was submitted, instead; Ctrl-C then leaves the job alone."
    parser.add_argument("--follow", metavar="JOB", default="", help=follow)
    pack = "File or folder that goes with the job beside these packages and --config; repeatable."
    parser.add_argument("--pack", metavar="PATH", action="append", default=[], help=pack)
    return parser
