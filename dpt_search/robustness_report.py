"""The noise study of a run, of a table, or of the published samples: what is read, and the printed table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dpt_search.config import BadConfig
from dpt_search.map_predictor import Array
from dpt_search.posterior import Hint
from dpt_search.published import PRESETS, published_samples
from dpt_search.robustness import POINT, Noise, Samples, Stability, study
from dpt_search.run import Run, read_dense_accuracy, read_ranking, recorded_run
from dpt_search.store import BadRun
from dpt_search.summary import text_table
from dpt_search.surface_table import read_table
from search_spaces.budgets import Budget, parse_budgets
from search_spaces.goals import Goal, goals
from search_spaces.ratios import Cell, RatioSpace
from trainables.intervals import accuracy_interval

_HEADER = ("noise", "budget", "cell", "same", "one off", "more", "mean cost", "95th percentile")


def run_study(location: str, *, preset: str, noise: float | None, budget: str, draws: int, seed: int) -> Iterator[str]:
    """Study the decisions of a run, and yield what to print.

    Args:
        location: the run directory, or a table.parquet; empty for the samples of the preset.
        preset: one of `PRESETS`, which then gives the noise; or empty.
        noise: sd of one trial in points; None for what the trials themselves tell.
        budget: text form; empty for the run's own.
        draws: how often.
        seed: of the disturbances.

    Raises:
        BadConfig: an option makes no sense.
        BadRun: there is nothing to decide from.
    """
    _check(location, preset, noise, draws, seed)
    try:
        budgets = parse_budgets(budget) if budget else ()
    except ValueError as error:
        raise BadConfig(str(error)) from None
    samples = samples_at(location, budgets) if location else _of_published(budgets)
    yield f"{samples.name}: {len(samples.accuracies)} trials, {draws} draws, everything learnt anew for each"
    if preset:
        noises = PRESETS[preset].noises
    else:
        noises = (Noise(samples.believe(samples.accuracies)[1] if noise is None else noise * POINT),)
    found = [(each, study(samples, samples.budgets, each, draws, seed)) for each in noises]
    yield f"\n{stability_table(found, PRESETS[preset].shares if preset else None)}\n"
    yield "shares with 95 % intervals of the draws; costs in points, by the undisturbed surface"


def _check(location: str, preset: str, noise: float | None, draws: int, seed: int) -> None:
    if not location and not preset:
        raise BadConfig("robustness of which run? Give its directory, or --preset hetdpt for the published samples")
    if preset and preset not in PRESETS:
        raise BadConfig(f"no preset {preset!r}: use {', '.join(PRESETS)}")
    if preset and noise is not None:
        raise BadConfig(f"--preset {preset} has noise of its own: leave out --noise")
    if noise is not None and not 0 <= noise < math.inf:
        raise BadConfig(f"--noise is {noise:g} points, but must be 0 or more")
    if draws < 1:
        raise BadConfig(f"--draws is {draws}, but must be at least 1")
    if seed < 0:
        raise BadConfig(f"--seed is {seed}, but must be 0 or more")


def stability_table(
    found: Sequence[tuple[Noise, Sequence[Stability]]], published: tuple[float, float, float] | None = None
) -> str:
    """Return one line per noise and budget, under what was published for comparison."""
    rows: list[Sequence[str]] = []
    if published is not None:
        rows.append(("as published", "", "", *(f"{share:.1%}" for share in published), "", ""))
    for noise, budgets in found:
        for each in budgets:
            costs = (np.mean(each.costs) / POINT, np.quantile(each.costs, 0.95) / POINT)
            shares = (_share(outcome) for outcome in each.outcomes)
            rows.append((str(noise), str(each.budget), str(each.cell), *shares, *(f"{cost:.3f}" for cost in costs)))
    return text_table(_HEADER, rows)


def _share(outcome: np.ndarray) -> str:
    found = accuracy_interval(outcome)
    return f"{found['accuracy']:.1%} ({100 * max(0.0, found['low']):.1f} to {100 * found['high']:.1f})"


def samples_at(location: str, budgets: Sequence[Budget] = ()) -> Samples:
    """Return the trials of a run directory, or those of a table of its surface.

    Args:
        location: where they are.
        budgets: what is decided; the run's own, or the table's default ones, where none are given.

    Raises:
        BadRun: there are none.
        BadConfig: a budget cannot be met, or not be answered there.
    """
    if location.endswith(".parquet"):
        return _of_table(location, budgets)
    return _of_run(recorded_run(location, lambda line: None), budgets)


def _of_published(budgets: Sequence[Budget]) -> Samples:
    samples = published_samples()
    return replace(samples, budgets=_resolved(budgets, samples.space)) if budgets else samples


def _resolved(budgets: Sequence[Budget], space: RatioSpace) -> tuple[Goal, ...]:
    try:
        return goals(budgets, space)
    except ValueError as error:
        raise BadConfig(str(error)) from None


def _of_run(run: Run, budgets: Sequence[Budget]) -> Samples:
    # Here, so that what is wrong with the options is said at once: these import scipy and optuna.
    from dpt_search.decisions import goals_of
    from dpt_search.hints import hints_of
    from dpt_search.search_stages import observations_of

    space, observations = read_ranking(run).space, observations_of(run)
    hints = hints_of(run.store, space, run.config)
    cells, accuracies = [each.plan.cell for each in observations], [each.accuracy for each in observations]
    decided, dense = goals_of(run, budgets), read_dense_accuracy(run)
    return _believed(run.config.run_dir, space, decided, cells, accuracies, hints, dense)


def _of_table(location: str, budgets: Sequence[Budget]) -> Samples:
    table = read_table(location)
    rows, seeds = np.nonzero(np.isfinite(table.accuracies))
    if len(rows) == 0:
        raise BadRun(f"no trial in the table {location!r} has finished")
    from dpt_search.compare_report import budgets_of

    resolved = _resolved(budgets, table.space) if budgets else budgets_of("", table.space)
    cells, accuracies = [table.cells[row] for row in rows], table.accuracies[rows, seeds].tolist()
    return _believed(location, table.space, resolved, cells, accuracies, dense=table.dense)


def _believed(
    name: str,
    space: RatioSpace,
    budgets: tuple[Goal, ...],
    cells: Sequence[Cell],
    accuracies: Sequence[float],
    hints: Sequence[Hint] = (),
    dense: float | None = None,
) -> Samples:
    """Return trials that are decided by as `recommend` does."""
    from dpt_search.recommend import beliefs

    def believe(disturbed: Array) -> tuple[Array, float]:
        found = beliefs(space, cells, disturbed, hints, dense)
        return found.mean, found.noise

    return Samples(name, space, budgets, np.array(accuracies), believe)
