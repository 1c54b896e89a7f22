"""`compare --live`: searches on real Ray, at equal cost, and what each would have decided on its way.

Every search is a run directory of its own, with the run's costs and ranking; the dense model's weights stay where they
are. Its trials, its probe and its proposals have seeds of their own; the data are the run's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dpt_search.allowance import Allowance, Prices
from dpt_search.config import LATER, RunConfig, check, identity
from dpt_search.decisions import NAME as MEASURED
from dpt_search.decisions import goals_of
from dpt_search.hints import hints_of, prior_surface
from dpt_search.lease import Lease
from dpt_search.map_predictor import Array
from dpt_search.observed import surface_trials
from dpt_search.posterior import Hint
from dpt_search.probe_stage import has_probe, probe_task, probed_cells
from dpt_search.probe_table import read_probe
from dpt_search.problem import Observed, Problem
from dpt_search.run import Run, digest_of, open_run, read_dense_accuracy, read_ranking
from dpt_search.samplers import PURE
from dpt_search.search_stages import search
from dpt_search.store import BadRun, RunStore, TrialLog
from search_spaces.goals import Goal
from search_spaces.plan import PruningPlan
from search_spaces.ratios import Cell

SAMPLERS = {"map": "map", "map/no-probe": "map", **{name: name for name in PURE}}
"""What can be compared, and the sampler of each. Pure searches are decided by the posterior, as a run of theirs is, but
without hints."""
RESEED = 10_000_000
"""Apart are the seeds of two searches; more than all trials of a table take."""
_SHARED = ("dense/dense.json", "costs.parquet", "ranking.json")


@dataclass(frozen=True)
class Search:
    """One search of the comparison.

    Attributes:
        name: key of `SAMPLERS`.
        number: from 0, its repetition.
        run: its own run directory.
        prices: what its trials and probe cost.
    """

    name: str
    number: int
    run: Run
    prices: Prices

    @property
    def upfront(self) -> float:
        """Cost of its probe, as predicted until it has ended; 0 without one."""
        found = read_probe(self.run.store)
        # Asked for at every proposal: whether it is to have one is looked up only as long as there is none.
        if found is not None and self.run.config.sampler == "map":
            return float(found.about["cost"])
        return self.prices.probe(probe_task(self.run)) if has_probe(self.run) else 0.0

    def go_on(self, max_cost: float) -> None:
        """Run trials until probe and trials cost as much as `max_cost` trials of the dense model."""
        with Lease(self.run.store):
            search(self.run, Allowance(max_cost * self.prices.unit, self.prices, lambda: self.upfront))


@dataclass(frozen=True)
class Decisions:
    """What a search would have decided, after its probe and after every trial that ended.

    Attributes:
        cost: [n] cost of the probe and of the trials so far, in trials of the dense model; not decreasing.
        chosen: [n] the cell of every budget.
        surface: [cells of the space], what is believed after the last of them that is within the limit.
        upfront: cost of the probe, which is in `cost` from the start.
    """

    cost: Array
    chosen: list[list[Cell]]
    surface: Array | None
    upfront: float

    def last(self, max_cost: float) -> int:
        """Return the position of the last decision within a cost; of the first where there is none."""
        return max(0, int(np.searchsorted(self.cost, max_cost * (1 + 1e-9), side="right")) - 1)


def opened(run: Run, out: RunStore, name: str, number: int, prices: Prices, told: dict[str, Any]) -> Search:
    """Open a search of the comparison, begun or not.

    Args:
        run: the run whose configuration it has.
        out: where the comparison's searches are.
        name: key of `SAMPLERS`.
        number: its repetition.
        prices: of its trials.
        told: fields of the configuration that differ from the run's.

    Raises:
        BadRun: the directory has a search with other settings, naming one that differs.
        BadConfig: the settings make no sense.
    """
    location = out.path(f"{name.replace('/', '-')}-{number}")
    config, store = _configured(run, name, location, told), RunStore(location)
    check(config)
    settings = _settings(run, config, number)
    _check_settings(store, settings)
    for shared in _SHARED:
        store.write(shared, run.store.read(shared))
    # Plans that were built and timed say which cells meet a limit, in the search as in the run.
    store.write_json(MEASURED, run.store.read_json(MEASURED) or {})
    store.write_json("live.json", settings)
    made = open_run(config, lambda line: run.say(f"{name} {number}: {line}"))
    return Search(name, number, replace(made, reseed=RESEED * (1 + number), session=run.session), prices)


def _configured(run: Run, name: str, location: str, told: dict[str, Any]) -> RunConfig:
    sampler = SAMPLERS[name]
    own = {**told, "model": run.model, "adapt": replace(run.config.adapt, epochs=0), "run_dir": location}
    own |= {"probe_epochs": 0} if name == "map/no-probe" else {}
    own |= {"prior": []} if sampler != "map" else {}
    # The cost alone ends the search.
    endless = {"max_trials": 10**6, "max_hours": 0.0, "finetune_budget": "", "refine": 0}
    return replace(run.config, **{**own, **endless, "sampler": sampler})


def _settings(run: Run, config: RunConfig, number: int) -> dict[str, Any]:
    """Return all that a search's trials follow from, by the name of the field or file."""
    growing = {k: v for k, v in asdict(config).items() if k in ("sampler", "budget", "design", "prior")}
    probe = {k: v for k, v in asdict(config).items() if k.startswith("probe_")}
    shared = {name: digest_of(run.store.read(name).hex()) for name in _SHARED}
    told = {**identity(config), **growing, **probe, **shared, **_fronts(run, config), "number": number}
    if config.epochs_of_probe and config.sampler == "map":
        lines = [goal.cells for goal in goals_of(run, config.budgets)]
        cells = probed_cells(read_ranking(run).space, lines, config.probe_cells)
        told["choice of probed cells"] = [(cell.n_attn, cell.n_act) for cell in cells]
    made: dict[str, Any] = json.loads(json.dumps(told))
    return made


def _fronts(run: Run, config: RunConfig) -> dict[str, list[tuple[int, int]]]:
    """Return the cells of the budgets whose text does not say it all: those that costs or limits bear on."""
    asked = [budget for budget in config.budgets if budget.quantity != "units" or config.limits]
    found = goals_of(run, asked) if asked else ()
    return {f"front of {goal}": [(cell.n_attn, cell.n_act) for cell in goal.cells] for goal in found}


def _check_settings(store: RunStore, settings: dict[str, Any]) -> None:
    before = store.read_json("live.json")
    differs = [name for name in settings if before is not None and before.get(name, LATER.get(name)) != settings[name]]
    if differs:
        raise BadRun(
            f"{store.location!r} has a search with another {differs[0]}: choose another --out, or remove that directory"
        )


def decided(each: Search, budgets: Sequence[Goal], max_cost: float) -> Decisions:
    """Return what a search would have decided on its way, in the order in which probe and trials ended.

    Args:
        each: a search.
        budgets: what is decided, each with the cells it is decided among.
        max_cost: limit of what counts, in trials of the dense model.
    """
    run, hinted, unit = each.run, SAMPLERS[each.name] == "map", each.prices.unit
    ranking = read_ranking(run)
    seen = Observed(
        Problem(ranking.space, budgets, lambda cell: 1.0, run.config.seed, read_dense_accuracy(run)), degree=2
    )
    seen.take_hints([Hint(prior_surface(location, ranking.space)) for location in run.config.prior])
    probe = run.store.read_json("stages/probe.json") if hinted else None
    events: list[tuple[float, Any]] = [(f.time, f) for f in surface_trials(TrialLog(run.store), ranking)]
    if probe is not None:
        events.append((probe["finished_at"], None))
    spent = each.upfront
    costs, chosen, surface = [], [], None
    for _, trial in sorted(events, key=lambda event: event[0]):
        if trial is None:
            seen.take_hints(hints_of(run.store, ranking.space, run.config))
        else:
            spent += trial.cost
            if trial.accuracy is not None:
                seen.add(PruningPlan.parse(trial.plan).cell, trial.accuracy)
        costs.append(spent / unit)
        chosen.append(seen.best_by_posterior())
        if spent / unit <= max_cost * (1 + 1e-9):
            surface = seen.posterior_mean()
    return Decisions(np.array(costs), chosen, surface, each.upfront / unit)
