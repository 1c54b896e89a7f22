"""What trials and probe cost is known before they run, and a search stops at a cost."""

from dataclasses import replace
from typing import Any, get_args

import pytest
from conftest import TINY_RANKING, TINY_SPLITS, tiny_prices
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import IntDistribution
from optuna.samplers import RandomSampler

from dpt_search.allowance import Allowance, Prices
from dpt_search.probe_stage import probe_task
from dpt_search.run import Run
from dpt_search.store import Finished, TrialLog
from dpt_search.tune_search import RecordedSearch, SearchPlan
from search_spaces.costs import Cost, UnitCosts
from search_spaces.plan import Attention, PruningPlan, Unit
from search_spaces.ratios import Cell
from trainables.data import split_sizes
from trainables.probe import run_probe
from trainables.settings import Recipe
from trainables.table_trial import run_trial
from trainables.tasks import TrialTask


@pytest.mark.parametrize("attention", get_args(Attention))
@pytest.mark.parametrize(
    ("distillation", "subset", "val_limit", "batch"), [("none", 0, 0, 32), ("soft", 0, 20, 36), ("none", 50, 0, 16)]
)
def test_what_trials_and_probe_cost_is_known_before_they_run(
    tiny_run: Run, attention: Any, distillation: Any, subset: int, val_limit: int, batch: int
) -> None:
    recipe = replace(tiny_run.config.trial, epochs=2, distillation=distillation, batch_size=batch)
    data = replace(tiny_run.config.data, subset=subset, val_limit=val_limit)
    tiny_run.config = replace(tiny_run.config, trial=recipe, attention=attention, data=data)
    task = TrialTask(**tiny_run.task(), recipe=recipe, checkpoints=tiny_run.store.path("states"))
    assert split_sizes(task.data, task.seed) == TINY_SPLITS
    for number, cell in enumerate([Cell(0, 0), Cell(2, 1)]):
        found = run_trial(task, number, str(TINY_RANKING.plan(cell)), 7)
        assert tiny_prices(tiny_run).trial(cell) == pytest.approx(found["cost"], rel=1e-9), cell
    probe = probe_task(tiny_run)
    assert tiny_prices(tiny_run).probe(probe) == pytest.approx(run_probe(probe)["cost"], rel=1e-9)


def unit_costs() -> UnitCosts:
    saved = {Unit(kind, i): Cost(10.0, 1.0, {}) for kind in ("attn", "act") for i in range(4)}
    return UnitCosts(Cost(100.0, 9.0, {}), saved, "a CPU")


@given(
    st.floats(0.5, 20), st.floats(0, 5), st.lists(st.sampled_from(list(TINY_RANKING.space)), min_size=30, max_size=30)
)
def test_trials_stop_at_the_cost_and_not_before(most: float, probe: float, cells: list[Cell]) -> None:
    made = Prices(unit_costs(), TINY_RANKING, Recipe(epochs=1), "zero", TINY_SPLITS)
    allowance = Allowance(most * made.unit, made, lambda: probe * made.unit)
    running: list[Cell] = []
    while not allowance.is_spent([], running):
        running.append(cells[len(running) % 30])
    paid = probe * made.unit + sum(made.trial(cell) for cell in running)
    # One more would not end within the cost, and without the last there was room for one.
    assert paid + made.cheapest > allowance.most
    if running:
        assert paid - made.trial(running[-1]) + made.cheapest <= allowance.most * (1 + 1e-9)
    ended = [Finished(i, "dense", "dense", "finished", [0.1], 0.0, made.trial(c)) for i, c in enumerate(running)]
    ended = [replace(each, cost=made.trial(cell)) for each, cell in zip(ended, running, strict=True)]
    assert allowance.is_spent(ended, [])
    assert allowance.spent(ended) == pytest.approx(paid)


def test_a_search_proposes_while_the_cost_allows_it(tiny_run: Run) -> None:
    made = tiny_prices(tiny_run)
    allowance = Allowance(3.5 * made.unit, made, lambda: made.unit)
    space = {name: IntDistribution(0, 4) for name in ("n_attn", "n_act")}
    plan = SearchPlan(
        "random", RandomSampler(0), space, lambda params: Cell(params["n_attn"], params["n_act"]),
        lambda cell: {"n_attn": cell.n_attn, "n_act": cell.n_act}, TINY_RANKING, 0, 99, 5, allowance=allowance,
    )  # fmt: skip
    log = TrialLog(tiny_run.store)
    task = TrialTask(**tiny_run.task(), recipe=tiny_run.config.trial, checkpoints="")
    search = RecordedSearch(plan, log, task, lambda _: None)
    number = 0
    while isinstance(search.suggest(str(number)), dict):
        number += 1
    cells = [PruningPlan.parse(log.proposed[n].plan).cell for n in sorted(log.proposed)]
    assert len(cells) == number >= 2
    # The running ones are counted as predicted, and the probe is.
    assert made.unit + sum(map(made.trial, cells)) + made.cheapest > allowance.most
    assert made.unit + sum(map(made.trial, cells[:-1])) + made.cheapest <= allowance.most
