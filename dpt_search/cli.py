"""The command line. The only place that prints."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from dpt_search.options import DESCRIPTIONS, parse, read_config, recorded_config, simple_parser
from search_spaces import BadInput
from trainables.devices import DEVICES

HELP = """usage: dpt-search VERB [options]

Make a Vision Transformer faster by removing whole layers, and search on Ray for which ones.

  run        everything: from a dense model to a faster one and a report
  bench      time models and exports side by side
  compare    set searchers against each other: replayed over tables of real surfaces, or run on Ray
  resolve    answer any budget, or all, from the trials already paid for, with no training
  robustness how often noise of the trials would have changed the decisions, and what that costs
  tabulate   run every cell with several seeds: a table of the real surface, to judge searches on
  doctor     say what this machine and this model can do
  submit     any of these as a job on a Ray cluster: dpt-search submit --address URL run ...

Each stage of a run alone, on a run directory:

{stages}

`dpt-search VERB --help` has the options. `dpt-search run` alone runs the embedded example.
"""


def main(argv: list[str]) -> int:
    """Run one verb.

    Args:
        argv: arguments after the program's name.

    Returns:
        0 when all is well, 2 when the user's input is wrong (one line says how), 1 when something else failed, 130
        when interrupted.
    """
    verbs: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "resolve": _resolve,
        "robustness": _robustness,
        "tabulate": _tabulate,
        "compare": _compare,
        "bench": _bench,
        "doctor": _doctor,
        **{verb: _stage(verb) for verb in DESCRIPTIONS if verb != "run"},
        "report": _report,
    }
    verbs["submit"] = lambda rest: _submit(rest, [verb for verb in verbs if verb != "submit"])
    if not argv or argv[0] in ("-h", "--help", "help"):
        stages = "\n".join(f"  {verb:<10} {text}" for verb, text in DESCRIPTIONS.items() if verb != "run")
        print(HELP.format(stages=stages), end="")
        return 0
    if argv[0] == "--version":
        from dpt_search import __version__

        print(f"dpt-search {__version__}")
        return 0
    if argv[0] not in verbs:
        return _fail(f"no verb {argv[0]!r}: use one of {', '.join(verbs)}", 2)
    try:
        return verbs[argv[0]](argv[1:])
    except BadInput as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", 130)
    except (RuntimeError, OSError) as error:
        return _fail(str(error), 1)


def _fail(message: str, code: int) -> int:
    print(f"dpt-search: {message}", file=sys.stderr)
    return code


def say(line: str) -> None:
    """Print a line of progress with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def _run(argv: list[str]) -> int:
    _do(read_config("run", argv))
    return 0


def _stage(verb: str) -> Callable[[list[str]], int]:
    def work(argv: list[str]) -> int:
        _do(read_config(verb, argv), verb)
        return 0

    return work


def _do(config: Any, only: str = "") -> None:
    """Run one stage, or all, under the run directory's lease, and end with the result as it stands."""
    from dpt_search.config import check
    from dpt_search.lease import Lease
    from dpt_search.preflight import check_place
    from dpt_search.run import open_run
    from dpt_search.store import RunStore
    from dpt_search.summary import result_table, stage_times

    # Before the lease, so that a wrong value leaves no directory behind.
    check(config)
    check_place(config)
    with Lease(RunStore(config.run_dir)), open_run(config, say) as run:
        # After the checks, which are quick: the stages import scipy and optuna.
        from dpt_search.stages import STAGES, WHOLE, trains

        say(f"run directory {run.store.root if run.store.is_local else config.run_dir}")
        names = (only,) if only else WHOLE
        run.finetunes = trains(run, names)
        for name in names:
            STAGES[name](run)
        if not only:
            print(f"\n{stage_times(run.store)}\n\n{result_table(run.store)}\n")
            print(f"report: {run.store.path('report.html')}")


def _report(argv: list[str]) -> int:
    """Write the page of a run, which may be under way: nothing of its record is touched."""
    parser = simple_parser("report", DESCRIPTIONS["report"])
    parser.add_argument("run", metavar="RUN", help="The run directory.")
    given = parse(parser, argv)
    from dpt_search.report import write_report
    from dpt_search.run import recorded_run

    print(f"report: {write_report(recorded_run(given.run, say).store)}")
    return 0


def _resolve(argv: list[str]) -> int:
    parser = simple_parser("resolve", "Answer budgets from the trials already paid for, with no training.")
    parser.add_argument("run", metavar="RUN", help="The run directory.")
    which = "units=8, speedup=1.5, macs=0.6 or params=40M, or several; empty: the whole front, with CSV and plot."
    parser.add_argument("--budget", default="", help=which)
    parser.add_argument("--against", default="speedup", help="Of the front: speedup, speedup@1, macs or params.")
    given = parse(parser, argv)
    from dpt_search.resolve import answer, answer_all
    from dpt_search.run import recorded_run
    from search_spaces.budgets import parse_budgets

    try:
        budgets = parse_budgets(given.budget) if given.budget else ()
    except ValueError as error:
        raise BadInput(str(error)) from None
    run = recorded_run(given.run, say)
    for line in answer(run, budgets) if budgets else answer_all(run, given.against):
        print(line)
    return 0


def _robustness(argv: list[str]) -> int:
    parser = simple_parser("robustness", "Disturb the trials by noise, decide anew, and see how often decisions stay.")
    where = "The run directory, or a table that `dpt-search tabulate` wrote; needed without --preset."
    preset = "hetdpt: the noise of the published study, on its samples where no RUN is named."
    parser.add_argument("run", metavar="RUN", nargs="?", default="", help=where)
    parser.add_argument("--preset", default="", help=preset)
    parser.add_argument("--noise", type=float, default=None, help="sd of one trial in points; left out: as learnt.")
    parser.add_argument("--budget", default="", help="units=8, or several at once: units=4,6; empty: the run's own.")
    parser.add_argument("--draws", type=int, default=1000, help="How often.")
    parser.add_argument("--seed", type=int, default=0, help="Of the noise.")
    given = parse(parser, argv)
    from dpt_search.robustness_report import run_study

    for line in run_study(
        given.run,
        preset=given.preset, noise=given.noise, budget=given.budget, draws=given.draws, seed=given.seed,
    ):  # fmt: skip
        print(line, flush=True)
    return 0


def _tabulate(argv: list[str]) -> int:
    parser = simple_parser("tabulate", "Run every cell with several seeds: a table of the real surface.")
    parser.add_argument("run", metavar="RUN", help="The run directory, with its dense model, profile and ranking done.")
    parser.add_argument("--cells", choices=["all", "even"], default="all", help="Even: an even number of units.")
    parser.add_argument("--seeds", type=int, default=3, help="Trials per cell, or of every walk (default: 3).")
    parser.add_argument("--close_seeds", type=int, default=0, help="Trials of cells close to the best of their line.")
    parser.add_argument("--close", type=float, default=0.5, help="How close that is, in points (default: 0.5).")
    parser.add_argument("--probes", type=int, default=0, help="Elastic probes to run instead, each with a seed.")
    most = "Well-spread cells that each of these evaluates, at most; 0 for all of --cells."
    parser.add_argument("--probe_cells", type=int, default=0, help=most)
    walks = "The published walks instead, --seeds times: each trial starts from the weights of the one before it."
    parser.add_argument("--walks", action="store_true", help=walks)
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th trial from the I-th on (default: 0/1).")
    given = parse(parser, argv)
    if given.seeds < 1:
        raise BadInput(f"--seeds is {given.seeds}, but must be at least 1")
    from dpt_search.probe_seeds import tabulate_probes
    from dpt_search.run import configured_run, read_ranking
    from dpt_search.tabulate import Request, parse_shard, tabulate, wanted_cells
    from dpt_search.walks import tabulate_walks

    shard = parse_shard(given.shard)
    with configured_run(recorded_config(given.run), say) as run:
        if given.walks:
            place = tabulate_walks(run, given.seeds)
        elif given.probes:
            cells = wanted_cells(read_ranking(run).space, given.cells)
            place = tabulate_probes(run, given.probes, cells[: given.probe_cells or None])
        else:
            request = Request(given.cells, given.seeds, given.close_seeds, given.close)
            place = tabulate(run, request, shard)
    if place:
        print(f"table: {place}")
    return 0


def _compare(argv: list[str]) -> int:
    from dpt_search.compare_options import comparison

    for line in comparison(argv, say):
        print(line, flush=True)
    return 0


def _bench(argv: list[str]) -> int:
    parser = simple_parser("bench", "Time models and exports side by side, interleaved. Speed only, no accuracy.")
    what = "A run directory (its export), an export/ folder, a .pt2 or .onnx file, dense:RUN or timm:NAME."
    parser.add_argument("models", metavar="MODEL", nargs="+", help=what)
    parser.add_argument("--batch", default="1,64", help="Batch sizes (default: 1,64).")
    parser.add_argument("--device", choices=list(DEVICES), default="cpu", help="Where (default: cpu).")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1).")
    parser.add_argument("--seconds", type=float, default=10.0, help="Time for each batch size (default: 10).")
    parser.add_argument("--compiled", action="store_true", help="Compile the models first; ONNX stays as it is.")
    given = parse(parser, argv)
    from dpt_search.bench import Request, measure

    try:
        batches = tuple(int(size) for size in given.batch.split(","))
    except ValueError:
        raise BadInput(f"cannot read --batch {given.batch!r}: write 64, or several: 1,64") from None
    print(measure(Request(given.models, batches, given.device, given.threads, given.seconds, given.compiled), say))
    return 0


def _doctor(argv: list[str]) -> int:
    parser = simple_parser("doctor", "Say what this machine and this model can do.")
    parser.add_argument("--model.name", default="", help="timm name of a model to look at; --model NAME is the same.")
    what = """Further arguments of timm.create_model, such as '{"img_size": 64}'."""
    parser.add_argument("--model.kwargs", type=dict[str, Any], default={}, help=what)
    given = parse(parser, argv)
    from dpt_search.doctor import examine
    from trainables.settings import ModelSettings

    problems = 0
    for line, ok in examine(ModelSettings(given.model.name, given.model.kwargs)):
        print(f"{'ok  ' if ok else 'NO  '} {line}", flush=True)
        problems += not ok
    return 1 if problems else 0


def _submit(argv: list[str], verbs: list[str]) -> int:
    from dpt_search.submit_options import submission

    return submission(argv, verbs, lambda text: print(text, end="", flush=True))


def entry() -> None:
    """Console script."""
    # A reader that went away (`| head`) is no error of ours.
    try:
        code = main(sys.argv[1:])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
