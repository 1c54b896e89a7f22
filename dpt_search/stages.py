"""The stages of a run, in order; each reads and writes the run directory only.

dense -> profile -> rank -> search -> recommend -> finetune -> export -> report
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dpt_search.config import BadConfig
from dpt_search.costs_table import read_costs, write_costs
from dpt_search.progress import EpochLines, TrialLines
from dpt_search.recommend import Observation, recommend
from dpt_search.run import Run, base_task, digest_of, identity_of
from dpt_search.samplers import cell_of, make_sampler, params_of, search_space
from dpt_search.store import BadRun, TrialLog
from search_spaces.budgets import Budget
from search_spaces.plan import PruningPlan, Ranking
from search_spaces.ratios import Cell, RatioSpace
from trainables.settings import Recipe
from trainables.tasks import ExportTask, FinetuneTask, ProfileTask, RankTask, TrialTask


def dense(run: Run) -> None:
    """Open model and data, adapt the model if asked to, and check its accuracy on val."""

    def work(digest: str) -> None:
        config = run.config
        before = run.task() | {"model": config.model}
        units = run.call("trainables.dense_check:check_model", type(base_task(run))(**before))
        _check_budgets(run, RatioSpace(len(units["attn"]), len(units["act"])))
        if config.adapt.epochs:
            run.say(f"adapting the dense model for {config.adapt.epochs} epochs")
            _train(run, before, PruningPlan(), config.adapt, "dense", digest)
        found = run.call("trainables.dense_check:check_dense", base_task(run))
        for warning in found["warnings"]:
            run.say(f"warning: {warning}")
        run.store.write_json("dense/dense.json", {**found, "adapted_epochs": config.adapt.epochs, "units": units})

    run.stage("dense", identity_of(run.config), "dense/dense.json", work)
    found = run.store.read_json("dense/dense.json")
    _check_budgets(run, RatioSpace(len(found["units"]["attn"]), len(found["units"]["act"])))
    run.say(f"dense accuracy on val {found['accuracy']:.2%} (chance {found['chance']:.1%})")


def _check_budgets(run: Run, space: RatioSpace) -> None:
    for budget in run.config.budgets:
        try:
            budget.feasible(space)
        except ValueError as error:
            raise BadConfig(str(error)) from None


def profile(run: Run) -> None:
    """Measure MACs, parameters and seconds of every unit on the target device."""
    config = run.config
    if run.store.exists("costs.parquet") and run.store.read_json("stages/profile.json") is None:
        run.say("profile: costs.parquet is there already and is used as it is")
        return

    def work(_: str) -> None:
        task = ProfileTask(**run.task(), batches=tuple(config.timing_batches), seconds=config.timing_seconds)
        found = run.call("trainables.timing:profile", task)
        write_costs(run.store, found["device"], found["rows"])

    inputs = [identity_of(config), config.timing_batches, config.timing_seconds]
    if run.stage("profile", inputs, "costs.parquet", work):
        costs = read_costs(run.store)
        assert costs is not None
        run.say(f"dense model: {costs.dense.macs / 1e6:.4g} M MACs, {costs.dense.params / 1e6:.3g} M parameters")


def rank(run: Run) -> None:
    """Order the units within each kind, least important first."""

    def work(_: str) -> None:
        run.store.write_json(
            "ranking.json",
            run.call("trainables.importance:rank", RankTask(**run.task(), batches=run.config.rank_batches)),
        )

    if run.stage("rank", identity_of(run.config), "ranking.json", work):
        ranking = read_ranking(run)
        run.say(f"least important first: attn {_listed(ranking.attn)}; act {_listed(ranking.act)}")


def read_ranking(run: Run) -> Ranking:
    """Return the run's ranking.

    Raises:
        BadRun: there is none yet.
    """
    found = run.store.read_json("ranking.json")
    if found is None:
        raise BadRun(f"no ranking in {run.store.location!r} yet: run `dpt-search rank` on it first")
    return Ranking(tuple(found["attn"]), tuple(found["act"]))


def search(run: Run) -> None:
    """Run trials until there are enough of them."""
    from dpt_search.tune_search import SearchPlan, run_search

    config, ranking, log = run.config, read_ranking(run), TrialLog(run.store)
    for name in log.broken:
        run.say(f"warning: skipped an unreadable record of the trial log: {name}")
    distributions = search_space(config.sampler, ranking.space, config.budgets)

    def work(_: str) -> None:
        if not log.unfinished and len(log.proposed) >= config.max_trials:
            return
        run.start_ray()
        concurrent = _concurrent(run, ranking.space)
        lines = TrialLines(run.say, log, config.max_trials, concurrent)
        plan = SearchPlan(
            name=config.sampler,
            sampler=make_sampler(
                config.sampler, ranking.space, config.budgets, seed=config.seed, cost=_trial_cost(run, ranking)
            ),
            distributions=distributions,
            cell_of=lambda params: cell_of(params, ranking.space, config.budgets),
            params_of=lambda cell: params_of(cell, config.sampler, ranking.space, config.budgets),
            ranking=ranking,
            seed=config.seed,
            max_trials=config.max_trials,
            max_failures=config.max_failures,
            deadline=time.time() + 3600 * config.max_hours if config.max_hours else math.inf,
        )
        task = TrialTask(
            **run.task(config.cpus_per_trial),
            recipe=config.trial,
            checkpoints=run.store.path("checkpoints"),
            timeout=config.trial_timeout,
        )
        run_search(plan, log, task, _trial_resources(run), concurrent, lines.ended)
        for name in run.store.names("checkpoints"):
            run.store.delete(f"checkpoints/{name}")
        log.compact()

    inputs = [
        run.store.read_json("ranking.json"), config.sampler, str(config.budget), config.max_trials, config.max_hours,
        len(log.unfinished),
    ]  # fmt: skip
    run.stage("search", inputs, "ranking.json", work)


def _trial_resources(run: Run) -> dict[str, float]:
    from dpt_search.remote import resources

    return resources(run.config, run.config.cpus_per_trial, run.config.devices_per_trial)


def _trial_cost(run: Run, ranking: Ranking) -> Callable[[Cell], float]:
    """Return MACs of a forward pass in training, where an activation's removal saves none: the layers merge later."""
    costs = read_costs(run.store)
    assert costs is not None
    return lambda cell: costs.of(PruningPlan(attn=ranking.plan(cell).attn)).macs


def _concurrent(run: Run, space: RatioSpace) -> int:
    """Return the number of trials at a time: more than a quarter of the feasible cells would be random search."""
    from dpt_search.remote import capacity

    feasible = {cell for budget in run.config.budgets for cell in budget.feasible(space)}
    held = capacity(_trial_resources(run))
    return run.config.max_concurrent or max(1, min(held, len(feasible) // 4))


def recommend_stage(run: Run) -> None:
    """Decide, per budget, which cell is best by all that was observed."""
    log = TrialLog(run.store)
    done = [asdict(log.finished[n]) for n in sorted(log.finished)]

    def work(_: str) -> None:
        run.store.write_json("recommendation.json", decide(run, run.config.budgets))

    inputs = [digest_of(done), str(run.config.budget), run.store.read_json("ranking.json"), _costs_digest(run)]
    run.stage("recommend", inputs, "recommendation.json", work)


def decide(run: Run, budgets: tuple[Budget, ...]) -> dict[str, Any]:
    """Return recommendations and the whole surface from the trial log, with no training.

    Raises:
        BadRun: no trial has finished yet.
        BadConfig: a budget is larger than the space.
    """
    ranking, log, costs = read_ranking(run), TrialLog(run.store), read_costs(run.store)
    observations = [
        Observation(PruningPlan.parse(f.plan), f.start, f.accuracy, f.cost)
        for _, f in sorted(log.finished.items())
        if f.accuracy is not None
    ]
    if not observations:
        raise BadRun(f"no trial in {run.store.location!r} has finished yet: run `dpt-search search` on it first")
    _check_budgets(run, ranking.space)
    surface, found = recommend(ranking.space, budgets, observations)
    rows = []
    for each in found:
        plan = ranking.plan(each.cell)
        speedups = {str(b): costs.speedup(plan, b) for b in costs.dense.seconds} if costs is not None else {}
        rows.append(
            {
                "budget": str(each.budget), "cell": [each.cell.n_attn, each.cell.n_act], "plan": str(plan),
                "mean": each.mean, "sd": each.sd, "low": each.low, "high": each.high,
                "probability_best": each.probability_best, "status": each.status, "speedup": speedups,
            }
        )  # fmt: skip
    return {"budgets": rows, "surface": surface, "observations": len(observations)}


def finetune(run: Run) -> None:
    """Fine-tune the recommended plan for long on all training images."""
    chosen = chosen_row(run)
    config = run.config

    def work(digest: str) -> None:
        run.say(f"fine-tuning {chosen['plan']} for {config.finetune.epochs} epochs")
        plan = PruningPlan.parse(chosen["plan"])
        result = _train(run, run.task(), plan, config.finetune, "finetune", digest)
        run.store.write_json(
            "finetune/finetune.json", {**result, "budget": chosen["budget"], "start": "dense", "inputs": digest}
        )

    run.stage("finetune", _finetune_inputs(run, chosen), "finetune/finetune.json", work)


def _finetune_inputs(run: Run, chosen: dict[str, Any]) -> Any:
    return [chosen["plan"], asdict(run.config.finetune), identity_of(run.config)]


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


def _train(
    run: Run, told: dict[str, Any], plan: PruningPlan, recipe: Recipe, folder: str, digest: str
) -> dict[str, Any]:
    workers = run.config.finetune_workers
    task = FinetuneTask(
        **told | {"threads": run.config.cpus_per_trial},
        recipe=recipe, plan=str(plan), folder=run.store.path(folder), inputs=digest, workers=workers,
    )  # fmt: skip
    lines = EpochLines(run.say, run.store, f"{folder}/progress.json", digest, recipe.epochs)
    result: dict[str, Any] = run.call(
        "trainables.long_finetune:train_with_ray", task, _trial_resources(run), cpus=0, on_wait=lines.show
    )
    lines.show()
    for name in ("state.pt", "result.pt", "progress.json"):
        run.store.delete(f"{folder}/{name}")
    return result


def export(run: Run) -> None:
    """Merge, reload, compare, test once and time the fine-tuned model."""
    found = run.store.read_json("finetune/finetune.json")
    if found is None:
        raise BadRun(f"nothing fine-tuned in {run.store.location!r} yet: run `dpt-search finetune` on it first")

    def work(_: str) -> None:
        task = ExportTask(
            **run.task(),
            plan=found["plan"],
            weights=run.store.path("finetune/model.safetensors"),
            folder=run.store.path("export"),
            batches=tuple(run.config.timing_batches),
        )
        summary = run.call("trainables.export:export", task)
        run.store.write_json("export/summary.json", {**summary, "budget": found["budget"]})
        run.say(f"merged and unmerged logits differ by {summary['largest_logit_difference']:.1e} of the largest")

    run.stage("export", [found["inputs"], found["plan"], run.config.timing_batches], "export/summary.json", work)


def report(run: Run) -> str:
    """Write report.html and its plots; return where it is."""
    from dpt_search.report import write_report

    start = time.monotonic()
    path = write_report(run.store)
    run.store.write_json(
        "stages/report.json",
        {"stage": "report", "inputs": "", "seconds": time.monotonic() - start, "finished_at": time.time()},
    )
    return path


STAGES: dict[str, Callable[[Run], Any]] = {
    "dense": dense,
    "profile": profile,
    "rank": rank,
    "search": search,
    "recommend": recommend_stage,
    "finetune": finetune,
    "export": export,
    "report": report,
}
"""Every stage by name, in order."""


def _costs_digest(run: Run) -> str:
    return digest_of(run.store.read("costs.parquet").hex()) if run.store.exists("costs.parquet") else ""


def _listed(indices: tuple[int, ...]) -> str:
    return json.dumps(list(indices)).strip("[]")
