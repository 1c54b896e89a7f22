"""The stage of the elastic probe: shared weights, and an accuracy with them for some cells, well spread.

`search` runs it beside the first trials, where there is room for both, and takes what it found when it is there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from dpt_search.allowance import Prices
from dpt_search.costs_table import read_costs
from dpt_search.decisions import goals_of
from dpt_search.hints import hints_of
from dpt_search.posterior import Hint
from dpt_search.probe_table import NAME, SCHEMA, write_probe
from dpt_search.recipes import recipe_inputs
from dpt_search.remote import Pending, StageFailed, begin_in_own_room
from dpt_search.run import Run, identity_of, read_ranking
from dpt_search.waiting import Waiting
from search_spaces.ratios import Cell, RatioSpace, spread, within
from trainables.tasks import ProbeTask


def probe(run: Run) -> None:
    """Train the shared weights and evaluate cells with them, where the configuration has a probe."""
    if not run.config.epochs_of_probe:
        run.say("probe: left out (probe_epochs is 0)")
        return
    task = probe_task(run)

    def work(_: str) -> None:
        _announce(run, task)
        _write(run, task, run.call("trainables.probe:run_probe", task, cpus=run.config.cpus_per_trial))

    run.stage("probe", _inputs(run, task), NAME, work)


def has_probe(run: Run) -> bool:
    """Say whether the run's search has a probe: for weights to start from, or for its hint where it is not too dear."""
    config = run.config
    wanted = config.sampler == "map" or config.start == "probe"
    return wanted and bool(config.epochs_of_probe) and not _too_dear(run)


def prices_of(run: Run) -> Prices | None:
    """Return what the run's trials and probes cost; None where profile or number of images is not known.

    Raises:
        BadRun: the run has no ranking yet.
    """
    config, costs = run.config, read_costs(run.store)
    splits = (run.store.read_json("dense/dense.json") or {}).get("splits")
    if costs is None or splits is None:
        return None
    limits = {"train": config.data.subset, "val": config.data.val_limit, "probe": ProbeTask.images}
    images = {split: min(splits[split], limit or splits[split]) for split, limit in limits.items()}
    # Training drops what does not fill a batch.
    images["train"] -= images["train"] % config.trial.batch_size
    return Prices(costs, read_ranking(run), config.trial, config.attention, images)


def _too_dear(run: Run) -> str:
    """Return why a probe is not worth its cost, as text; empty where it may be, or is there to start from."""
    config = run.config
    if config.sampler != "map" or config.start == "probe" or not (config.probe_max_cost and config.epochs_of_probe):
        return ""
    prices = prices_of(run)
    cost = 0.0 if prices is None else prices.probe(probe_task(run)) / prices.unit
    limit = f"(--probe-max-cost {config.probe_max_cost:g})"
    return f"it would cost as much as {cost:.3g} trials {limit}" if cost > config.probe_max_cost else ""


def is_missing(run: Run) -> bool:
    """Say whether the run's search has a probe that is still to be made."""
    if not has_probe(run):
        return False
    weights = not run.start_weights or run.store.exists("probe/model.safetensors")
    return not (weights and run.is_done("probe", _inputs(run, probe_task(run)), NAME))


@dataclass
class ProbeBeside:
    """A probe that runs, or not, while the search does.

    Attributes:
        run: the run, whose Ray has started.
        task: what the worker was told; None without a probe.
        pending: the call, while it is under way.
        since: when it began, on the monotonic clock.
        waiting: says why it has no room, while it has none.
        placed: whether it has ever had room.
        told: whether it was said that trials wait for it.
    """

    run: Run
    task: ProbeTask | None = None
    pending: Pending | None = None
    since: float = 0.0
    waiting: Waiting | None = None
    placed: bool = False
    told: bool = False

    @classmethod
    def started(cls, run: Run, concurrent: int) -> ProbeBeside:
        """Begin the run's probe, unless it has none or it is done.

        It is waited for where trials start from its weights, and where they run one at a time: then the same search
        makes the same proposals again.

        Args:
            run: the run, whose Ray has started.
            concurrent: trials at a time.
        """
        config = run.config
        if not is_missing(run):
            why = _too_dear(run)
            # One that was made all the same, by `dpt-search probe`, counts.
            if why and not run.is_done("probe", _inputs(run, probe_task(run)), NAME):
                # What another probe found must not pass for this one's.
                run.store.delete(NAME)
                run.say(f"probe: left out, for {why}")
            return cls(run)
        task = probe_task(run)
        # What an earlier probe found must not pass for this one's.
        run.store.delete(NAME)
        _announce(run, task)
        pending = begin_in_own_room(config, "trainables.probe:run_probe", task, cpus=config.cpus_per_trial)
        beside = cls(run, task, pending, time.monotonic(), Waiting(run.say, run.finetune_resources))
        if config.start == "probe" or concurrent < 2:
            beside.finish()
        return beside

    def leaves(self, workers: int) -> int:
        """Return how many trials may run beside the probe: none before it has room, or it might wait for all of them.

        Args:
            workers: the trials that there is room for without it.
        """
        if self.pending is not None and self.pending.is_done():
            # It gives its room back.
            self.finish()
        if self.pending is None:
            return workers
        if not self._has_room():
            # One whose node was lost waits as any trial does: Tune keeps the place of the last trial for the next one,
            # so trials that waited for it might keep it from there for ever.
            return workers if self.placed else 0
        wanted, trial = self.run.finetune_resources, self.run.resources
        left = max(0, workers - math.ceil(max(wanted[name] / amount for name, amount in trial.items() if amount)))
        if not left and not self.told:
            self.run.say("the probe has all the room there is: trials begin after it, or when there is more")
            self.told = True
        return left

    def _has_room(self) -> bool:
        """Say whether the probe has begun, or at least may; say why not if that takes long."""
        assert self.pending is not None
        assert self.waiting is not None
        if self.pending.has_room():
            self.placed = True
            self.waiting.runs()
            return True
        self.waiting.look()
        return False

    def hints(self) -> list[Hint]:
        """Return the surfaces that are known by now; never waits."""
        if self.pending is not None and self.pending.is_done():
            self.finish()
        return hints_of(self.run.store, read_ranking(self.run).space, self.run.config)

    def finish(self) -> None:
        """Wait for the probe and write what it found; without one the search goes on, where it can.

        Raises:
            StageFailed: it failed, and trials start from its weights.
        """
        if self.pending is None or self.task is None:
            return
        while not self.pending.is_done(1.0):
            self._has_room()
        pending, self.pending = self.pending, None
        try:
            found = pending.value()
        except StageFailed as error:
            if self.run.config.start == "probe":
                raise
            self.run.say(f"warning: the probe failed, and the search goes on without it: {_last_line(error)}")
            return
        _write(self.run, self.task, found)
        self.run.record("probe", _inputs(self.run, self.task), time.monotonic() - self.since)
        self.run.say(f"probe: {len(self.task.cells)} cells in {found['seconds']:.0f} s")


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _announce(run: Run, task: ProbeTask) -> None:
    run.say(f"probe: {task.recipe.epochs} epochs, then {len(task.cells)} cells with the shared weights")


def _write(run: Run, task: ProbeTask, found: dict[str, Any]) -> None:
    told = {
        "draw": task.draw,
        "sandwich": task.sandwich,
        "seed": task.seed + task.reseed,
        "recipe": asdict(task.recipe),
    }
    rows = [{name: row[name] for name in SCHEMA.names} for row in found.pop("rows")]
    write_probe(run.store, rows, {**found, **told})
    run.store.delete("probe/state.pt")


def _inputs(run: Run, task: ProbeTask) -> list[Any]:
    lines = task.lines if task.draw == "line" or task.sandwich else ()
    about = [recipe_inputs(task.recipe), asdict(task.ranking), task.cells, task.draw, task.sandwich]
    return [identity_of(run.config), *about, lines]


def probed_cells(space: RatioSpace, lines: Iterable[Iterable[Cell]], most: int) -> tuple[Cell, ...]:
    """Return what the probe's weights are evaluated on: cells well spread over all up to the budgets', in order.

    Cells of one line alone, which all remove as many units, could not tell what either kind loses.

    Args:
        space: the lattice.
        lines: the budgets' cells.
        most: of them to return; 0 for all.
    """
    return tuple(sorted(spread(space, within(cell for line in lines for cell in line), most)))


def probe_task(run: Run) -> ProbeTask:
    """Return what the worker is told.

    Raises:
        BadRun: there is no ranking yet.
        BadConfig: a budget is out of reach.
    """
    config, ranking = run.config, read_ranking(run)
    lines = tuple(budget.cells for budget in goals_of(run))
    return ProbeTask(
        **run.task(config.cpus_per_trial),
        recipe=replace(
            config.trial,
            epochs=config.epochs_of_probe,
            lr=config.probe_lr or config.trial.lr,
            distillation="soft",
            compile=False,
        ),
        ranking=ranking,
        lines=lines,
        cells=probed_cells(ranking.space, lines, config.probe_cells),
        draw=config.probe_draw,
        sandwich=config.probe_sandwich,
        folder=run.store.path("probe"),
        reseed=run.reseed,
    )
