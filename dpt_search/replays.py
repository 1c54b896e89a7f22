"""Every strategy with every seed, in as many processes as wanted."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

import optuna

from dpt_search.compare import Trace, replay
from dpt_search.map_predictor import Array
from dpt_search.probe_seeds import ProbeSeeds
from dpt_search.surface_table import SurfaceTable
from dpt_search.walk_table import WalkTrial
from search_spaces.goals import Goal

SLOW, SLOW_SEEDS = ("gp",), 30
"""Samplers that need half a second for a suggestion, and the most replays of one."""
Job = tuple[str, int, Sequence[Goal]]
"""A strategy's name, a seed, and the budgets that are decided together."""
Map = Callable[[Callable[[Job], Trace], Iterable[Job]], Iterator[Trace]]


def compare(
    table: SurfaceTable,
    names: Sequence[str],
    budgets: Sequence[Goal],
    *,
    seeds: int,
    workers: int,
    max_trials: int,
    each: bool = False,
    probes: ProbeSeeds | None = None,
    prior: Array | None = None,
    walks: Sequence[Sequence[WalkTrial]] = (),
    processes: int = 1,
) -> dict[str, list[list[Trace]]]:
    """Replay every strategy with every seed, those of `SLOW` samplers with the first `SLOW_SEEDS` of them.

    Args:
        table: the surface.
        names: keys of `STRATEGIES`.
        budgets: what is decided.
        seeds: replays of every strategy.
        workers: trials at a time.
        max_trials: number of trials.
        each: solve one budget after another, each on its own; else all together.
        probes: what the probe says.
        prior: [cells], an earlier run's surface.
        walks: the published walks as recorded, by seed.
        processes: replays at a time, on a core each.

    Returns:
        By strategy, by seed, the replays of all budgets.
    """
    names = list(dict.fromkeys(names))
    problems = [[budget] for budget in budgets] if each else [list(budgets)]
    jobs = [(name, seed, problem) for name in names for seed in range(_seeds(name, seeds)) for problem in problems]
    work = partial(
        _replayed, table=table, workers=workers, max_trials=max_trials, probes=probes, prior=prior, walks=walks
    )
    with _mapping(min(processes, len(jobs))) as mapped:
        traces = mapped(work, jobs)
        return {
            name: [[next(traces) for _ in problems] for _ in range(_seeds(name, seeds))]
            for name in dict.fromkeys(names)
        }


def _seeds(name: str, seeds: int) -> int:
    return min(seeds, SLOW_SEEDS) if name.split("/")[0] in SLOW else seeds


def _replayed(
    job: Job,
    table: SurfaceTable,
    workers: int,
    max_trials: int,
    probes: ProbeSeeds | None,
    prior: Array | None,
    walks: Sequence[Sequence[WalkTrial]],
) -> Trace:
    name, seed, budgets = job
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return replay(
        table, name, budgets, seed=seed, workers=workers, max_trials=max_trials, probes=probes, prior=prior, walks=walks
    )


@contextmanager
def _mapping(processes: int) -> Iterator[Map]:
    """Hand out what maps jobs to their traces, in order."""
    if processes <= 1:
        yield map
        return
    # Libraries of linear algebra read it when a process begins: as many threads each as cores would only be in the way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield pool.map
