"""The stages that decide: the search, and the recommendation from what it observed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from optuna.samplers import BaseSampler

from dpt_search.allowance import Allowance
from dpt_search.costs_table import read_costs
from dpt_search.decisions import cell_costs, goals_of, measure, settled, standing_of
from dpt_search.hints import hints_of, prior_surface
from dpt_search.observed import ended, searched, surface_trials, unfinished
from dpt_search.posterior import Hint
from dpt_search.probe_stage import ProbeBeside, is_missing
from dpt_search.progress import TrialLines
from dpt_search.recommend import Observation, recommend
from dpt_search.run import Run, digest_of, read_dense_accuracy, read_ranking
from dpt_search.samplers import candidate_cells, cell_of, make_sampler, params_of, search_space
from dpt_search.store import BadRun, Finished, RunStore, TrialLog
from dpt_search.waiting import Waiting
from search_spaces.budgets import Budget
from search_spaces.costs import UnitCosts
from search_spaces.goals import Goal, Measured
from search_spaces.plan import PruningPlan, Ranking
from search_spaces.ratios import Cell


def search(run: Run, allowance: Allowance | None = None) -> None:
    """Run trials until there are enough of them, or they cost as much as they may.

    Args:
        run: a run with costs and a ranking.
        allowance: what trials and probe may cost; None for no limit.
    """
    from dpt_search.demand import Demand
    from dpt_search.search_plan import SearchPlan
    from dpt_search.tune_search import RecordedSearch, run_search

    config, ranking, log = run.config, read_ranking(run), TrialLog(run.store)
    for name in log.broken:
        run.say(f"warning: skipped an unreadable record of the trial log: {name}")
    # First of all: a budget out of reach ends here, before anything is trained.
    goals_of(run)

    def work(_: str) -> None:
        if not unfinished(log) and _is_enough(run, log, allowance):
            _make_missing_probe(run)
            check_any_finished(log)
            return
        run.start_ray()
        budgets = settled(run)
        concurrent = _concurrent(run, budgets)
        beside = ProbeBeside.started(run, concurrent)
        lines = TrialLines(run.say, log, config.max_trials, concurrent, allowance)
        plan = SearchPlan(
            name=config.sampler,
            sampler=_sampler(run, ranking, budgets, beside.hints),
            distributions=search_space(config.sampler, ranking.space, budgets),
            cell_of=lambda params: cell_of(params, budgets),
            params_of=lambda cell: params_of(cell, config.sampler, ranking.space, budgets),
            ranking=ranking,
            seed=config.seed + run.reseed,
            max_trials=config.max_trials,
            max_failures=config.max_failures,
            start=config.start,
            deadline=time.time() + 3600 * config.max_hours if config.max_hours else math.inf,
            allowance=allowance,
        )
        task = run.trial_task(config.cpus_per_trial, "checkpoints", config.trial_timeout)
        with Demand(run.resources, concurrent, beside.leaves, run.start_ray) as demand:
            proposer = RecordedSearch(plan, log, task, partial(_ended, run.store, lines), demand.room, lines.lost)
            demand.wait(proposer.remaining)
            run_search(proposer, log, task, run.resources, concurrent, Waiting(run.say, run.resources))
        beside.finish()
        for name in run.store.names("checkpoints"):
            run.store.delete(f"checkpoints/{name}")
        log.compact()
        check_any_finished(log)

    inputs = [*_search_inputs(run, log), *([] if allowance is None else [allowance.most])]
    if not run.stage("search", inputs, "trials", work):
        _make_missing_probe(run)


def _is_enough(run: Run, log: TrialLog, allowance: Allowance | None) -> bool:
    if allowance is not None and allowance.is_spent(ended(log), ()):
        return True
    return len(searched(log)) >= run.config.max_trials


def _make_missing_probe(run: Run) -> None:
    """Make a probe that failed beside the search, or whose finding was removed: the recommendation is better for it."""
    if is_missing(run):
        run.start_ray()
        ProbeBeside.started(run, 1)


def _search_inputs(run: Run, log: TrialLog) -> list[Any]:
    config = run.config
    return [
        run.store.read_json("ranking.json"), config.sampler, str(config.budget), config.max_trials, config.max_hours,
        len(unfinished(log)), {k: v for k, v in asdict(config).items() if k.startswith("probe_")}, config.prior,
        *_limits(run),
    ]  # fmt: skip


def _limits(run: Run) -> list[dict[str, int]]:
    """Return the limits on kinds for a digest of inputs, which without any is what it was before there were limits."""
    return [run.config.limits] if run.config.limits else []


def _ended(store: RunStore, lines: TrialLines, record: Finished) -> None:
    """Say how a trial ended, and delete what it would have gone on from."""
    store.delete(f"checkpoints/{record.trial:06d}.pt")
    lines.ended(record)


def check_any_finished(log: TrialLog) -> None:
    """Refuse to go on from trials that all failed.

    Raises:
        RuntimeError: with the reason of the last one.
    """
    if log.finished and all(record.accuracy is None for record in log.finished.values()):
        last = log.finished[max(log.finished)]
        raise RuntimeError(
            f"all {len(log.finished)} trials failed; the last one: {last.error}. Correct that and choose another "
            "--run-dir, or allow more trials with --max-trials"
        )


def _sampler(run: Run, ranking: Ranking, budgets: Sequence[Goal], hints: Callable[[], list[Hint]]) -> BaseSampler:
    config = run.config
    return make_sampler(
        config.sampler, ranking.space, budgets, seed=config.seed + run.reseed, cost=_trial_cost(run, ranking),
        design=config.design, hints=hints, dense=read_dense_accuracy(run),
    )  # fmt: skip


def _trial_cost(run: Run, ranking: Ranking) -> Callable[[Cell], float]:
    """Return MACs of a forward pass in training."""
    costs = read_costs(run.store)
    assert costs is not None
    return lambda cell: costs.training_macs(ranking.plan(cell), run.config.attention)


def _concurrent(run: Run, budgets: Sequence[Goal]) -> int:
    """Return the most trials at a time: more than a tenth of the candidates cost more and decide no sooner.

    A cluster may hold fewer now and more later, so what it holds is looked at before every proposal (`demand`).
    """
    from dpt_search.remote import capacity, is_cluster

    held, useful = max(1, capacity(run.resources)), max(2, len(candidate_cells(budgets)) // 10)
    if held > useful and not run.config.max_concurrent:
        run.say(f"{useful} trials at a time, though {held} would fit: more decide no sooner (--max-concurrent)")
    return run.config.max_concurrent or (useful if is_cluster() else min(held, useful))


def recommend_stage(run: Run) -> None:
    """Decide, per budget, which cell is best by all that was observed."""
    ranking = read_ranking(run)
    done = [asdict(each) for each in surface_trials(TrialLog(run.store), ranking)]

    def work(_: str) -> None:
        settled(run)
        run.store.write_json("recommendation.json", _timed(run, decide(run, run.config.budgets)))

    inputs = [
        digest_of(done), str(run.config.budget), run.store.read_json("ranking.json"),
        [prior_surface(location, ranking.space).tolist() for location in run.config.prior], read_dense_accuracy(run),
        *(_file_digest(run, name) for name in ("costs.parquet", "probe.parquet")), *_limits(run),
    ]  # fmt: skip
    run.stage("recommend", inputs, "recommendation.json", work)


def _timed(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """Return the recommendations once the plan to be fine-tuned for a speedup was built and timed, and is fast enough.

    One that is not makes room for the next best.
    """
    chosen = run.config.chosen_budget
    while chosen.batch:
        row = found["budgets"][run.config.budgets.index(chosen)]
        if row.get("measured", 0.0) is not None:
            break
        measure(run, [PruningPlan.parse(row["plan"])], f"{row['plan']}, the plan to be fine-tuned")
        settled(run)
        found = decide(run, run.config.budgets)
    return found


def decide(run: Run, budgets: tuple[Budget, ...]) -> dict[str, Any]:
    """Return recommendations and the whole surface from the trial log, with no training.

    Raises:
        BadRun: no trial has finished yet.
        BadConfig: a budget is out of reach.
    """
    ranking, costs, observations = read_ranking(run), cell_costs(run.store), observations_of(run)
    hints = hints_of(run.store, ranking.space, run.config)
    surface, found = recommend(ranking.space, goals_of(run, budgets), observations, hints, read_dense_accuracy(run))
    rows = []
    for budget, each in zip(budgets, found, strict=True):
        plan = ranking.plan(each.cell)
        rows.append(
            {
                "budget": str(each.budget), "cell": [each.cell.n_attn, each.cell.n_act], "plan": str(plan),
                "mean": each.mean, "sd": each.sd, "low": each.low, "high": each.high,
                "probability_best": each.probability_best, "status": each.status,
                "speedup": speedups(costs.costs, plan, costs.measured) if costs is not None else {},
                "candidates": [[cell.n_attn, cell.n_act] for cell in each.budget.cells],
                **(standing_of(run, budget, each.cell) or {}),
            }
        )  # fmt: skip
    return {"budgets": rows, "surface": surface, "observations": len(observations)}


def observations_of(run: Run) -> list[Observation]:
    """Return the trials that a run decides by, by number.

    Raises:
        BadRun: none has finished yet.
    """
    observations = [
        Observation(PruningPlan.parse(f.plan), f.start, f.accuracy, f.cost)
        for f in surface_trials(TrialLog(run.store), read_ranking(run))
        if f.accuracy is not None
    ]
    if not observations:
        raise BadRun(f"no trial in {run.store.location!r} has finished yet: run `dpt-search search` on it first")
    return observations


def speedups(
    costs: UnitCosts, plan: PruningPlan, measured: Mapping[str, Mapping[int, Measured]] | None = None
) -> dict[str, float]:
    """Return a plan's speedup by batch size: as measured where it was built and timed, else as predicted.

    A batch size whose prediction tells nothing is left out.
    """
    found = {batch: costs.speedup(plan, batch) for batch in costs.dense.seconds}
    timed = (measured or {}).get(str(plan), {})
    known = {str(batch): timed[batch].speedup if batch in timed else value for batch, value in found.items()}
    return {batch: speedup for batch, speedup in known.items() if not math.isnan(speedup)}


def chosen_row(run: Run) -> dict[str, Any]:
    """Return the recommendation that is fine-tuned.

    Raises:
        BadRun: there is no recommendation for the chosen budget yet.
    """
    found = run.store.read_json("recommendation.json")
    wanted = str(run.config.chosen_budget)
    rows: list[dict[str, Any]] = [] if found is None else [r for r in found["budgets"] if r["budget"] == wanted]
    if not rows:
        raise BadRun(f"no recommendation for {wanted} in {run.store.location!r} yet: run `dpt-search search` first")
    return rows[0]


def _file_digest(run: Run, name: str) -> str:
    return digest_of(run.store.read(name).hex()) if run.store.exists(name) else ""
