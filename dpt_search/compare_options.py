"""The options of `compare`, of its two kinds: replays over tables, and searches on Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from dpt_search.options import Parser, parse, recorded_config, simple_parser
from search_spaces import BadInput


def comparison(argv: list[str], say: Callable[[str], None]) -> Iterator[str]:
    """Read the options, compare, and yield what to print.

    Args:
        argv: arguments after the verb.
        say: prints a line of progress.

    Raises:
        BadInput: the options make no sense, or what they name cannot be used.
    """
    given = parse(_parser(), argv)
    _check_kind(given)
    names = [name.strip() for name in given.samplers.split(",") if name.strip()]
    try:
        workers = [int(number) for number in given.workers.split(",") if given.workers]
    except ValueError:
        raise BadInput(f"cannot read --workers {given.workers!r}: write 4, or several: 1,2,4") from None
    return _live(given, names, workers, say) if given.live else _replayed(given, names, workers)


def _parser() -> Parser:
    about = "Replay searchers over tables of real surfaces, or run them on Ray (--live), at equal cost."
    parser = simple_parser("compare", about)
    parser.add_argument(
        "tables", metavar="TABLE", nargs="*", default=[], help="Tables that `dpt-search tabulate` wrote."
    )
    live = "Run directory with dense model, profile and ranking: search for real, with Ray, instead of replays."
    parser.add_argument("--live", metavar="RUN", default="", help=live)
    parser.add_argument("--samplers", default="", help="Separated by commas; empty: all, or map,tpe,grid with --live.")
    budget = "Budgets decided at once; empty: units=4,6,... up to 5/6 of all, or the run's own with --live."
    parser.add_argument("--budget", default="", help=budget)
    concurrent = "Trials at a time (default: 1, or the run's own with --live); several, 1,2,4, are compared in replays."
    parser.add_argument("--workers", default="", help=concurrent)
    seeds = "Replays of every strategy (default: 30; of gp at most 30), or searches of each with --live (default: 2)."
    parser.add_argument("--seeds", type=int, default=None, help=seeds)
    parser.add_argument("--max_trials", type=int, default=None, help="Trials of every replay (default: 60).")
    parser.add_argument("--each", action="store_true", help="Replays decide one budget after another, each on its own.")
    parser.add_argument("--prior", default="", help="Table of an earlier run, for the replayed strategy map/prior.")
    cost = "With --live: cost of every search, its probe counted, in trials of the dense model (default: 20)."
    parser.add_argument("--max_cost", type=float, default=None, help=cost)
    judges = "With --live: trials that judge each chosen cell where the run has no table (default: 2)."
    parser.add_argument("--judge_seeds", type=int, default=None, help=judges)
    parser.add_argument("--probe_epochs", type=int, default=None, help="With --live: of the probe; 0 leaves it out.")
    processes = "Replays at a time, on a core each (default: as many as there are cores)."
    parser.add_argument("--processes", type=int, default=None, help=processes)
    out = "Folder for a page, and CSV and plot of every table; empty: none, or RUN/live, which has the searches too."
    parser.add_argument("--out", default="", help=out)
    return parser


def _check_kind(given: Any) -> None:
    """Refuse what a comparison of this kind would not look at."""
    if bool(given.live) == bool(given.tables):
        raise BadInput(
            "name tables to replay searchers over, or a run with --live RUN to search with them: one of both"
        )
    # Left out is None, no flag, or empty text; a number is never left out.
    left = (None, "")
    replays = [name for name in ("max_trials", "prior", "processes") if getattr(given, name) not in left] + [
        "each"
    ] * given.each
    searches = [name for name in ("max_cost", "judge_seeds", "probe_epochs") if getattr(given, name) not in left]
    for name in replays if given.live else searches:
        flag, kind = name.replace("_", "-"), "replays" if given.live else "--live"
        raise BadInput(f"--{flag} is for {kind} alone: leave it out")


def _replayed(given: Any, names: list[str], workers: list[int]) -> Iterator[str]:
    from dpt_search.compare_report import Request, run_comparison

    seeds, most = 30 if given.seeds is None else given.seeds, 60 if given.max_trials is None else given.max_trials
    processes = (os.cpu_count() or 1) if given.processes is None else given.processes
    told = (given.budget, workers or [1], seeds, most, given.each, given.prior, given.out, processes)
    yield from run_comparison(Request(given.tables, names, *told))


def _live(given: Any, names: list[str], workers: list[int], say: Callable[[str], None]) -> Iterator[str]:
    if len(workers) > 1:
        raise BadInput("--workers takes one number with --live")
    config = recorded_config(given.live)
    from dpt_search.live_report import Request, run_live
    from dpt_search.run import configured_run

    told = {name: getattr(given, name) for name in ("max_cost", "judge_seeds", "probe_epochs", "seeds")}
    told = {name: value for name, value in told.items() if value is not None}
    request = Request(names or ["map", "tpe", "grid"], given.budget, workers=sum(workers), out=given.out, **told)
    request.check()
    with configured_run(config, say) as run:
        yield from run_live(run, request)
