"""The stage of the elastic probe: shared weights, and every feasible cell's accuracy with them."""

from __future__ import annotations

from dataclasses import asdict, replace

from dpt_search.probe_table import NAME, write_probe
from dpt_search.run import Run, identity_of
from dpt_search.search_stages import check_budgets, read_ranking
from search_spaces.ratios import Cell
from trainables.tasks import ProbeTask


def probe(run: Run) -> None:
    """Train the shared weights and evaluate cells with them, where the configuration has a probe."""
    if not run.config.probe_epochs:
        run.say("probe: left out (probe_epochs is 0)")
        return
    task = probe_task(run)

    def work(_: str) -> None:
        run.say(f"probe: {task.recipe.epochs} epochs, then {len(task.cells)} cells with the shared weights")
        found = run.call("trainables.probe:run_probe", task, cpus=run.config.cpus_per_trial)
        told = {"draw": task.draw, "sandwich": task.sandwich, "seed": task.seed, "recipe": asdict(task.recipe)}
        write_probe(run.store, found.pop("rows"), {**found, **told})

    about = [asdict(task.recipe), asdict(task.ranking), task.cells, task.draw, task.sandwich]
    lines = task.lines if task.draw == "line" else ()
    run.stage("probe", [identity_of(run.config), *about, lines], NAME, work)


def probe_task(run: Run) -> ProbeTask:
    """Return what the worker is told.

    Raises:
        BadRun: there is no ranking yet.
        BadConfig: a budget is larger than the space.
    """
    config, ranking = run.config, read_ranking(run)
    check_budgets(config.budgets, ranking.space)
    lines = tuple(tuple(budget.feasible(ranking.space)) for budget in config.budgets)
    feasible = {Cell(0, 0), *(cell for line in lines for cell in line)}
    lr = config.probe_lr or config.trial.lr
    return ProbeTask(
        **run.task(config.cpus_per_trial),
        recipe=replace(config.trial, epochs=config.probe_epochs, lr=lr, distillation="soft"),
        ranking=ranking,
        lines=lines,
        cells=tuple(ranking.space if config.probe_all else sorted(feasible)),
        draw=config.probe_draw,
        sandwich=config.probe_sandwich,
        folder=run.store.path("probe"),
    )
