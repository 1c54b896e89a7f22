"""Replays over tables: fair by construction, whatever the strategy."""

from dataclasses import replace

import numpy as np
import pytest

from dpt_search.compare import POINT, Judge, dealt, replay, table_noise
from dpt_search.config import RunConfig
from dpt_search.curves import mean_curve
from dpt_search.map_sampler import published_walks
from dpt_search.posterior import Hint
from dpt_search.probe_seeds import ProbeSeeds
from dpt_search.problem import Observed, Problem
from dpt_search.replays import compare
from dpt_search.strategies import STRATEGIES
from dpt_search.surface_table import SurfaceTable
from dpt_search.walk_table import WalkTrial
from dpt_search.walks import walks_of
from search_spaces.goals import unit_goals
from search_spaces.ratios import Cell, RatioSpace

SPACE = RatioSpace(6, 6)
BUDGETS = unit_goals(SPACE, 4, 6)
NOISE = 0.002


def truth(cell: Cell) -> float:
    return 0.9 - 0.004 * (cell.n_attn - 1) ** 2 - 0.002 * (cell.n_act - 3) ** 2


def surface(seeds: int = 4, *, even: bool = False, noise: float = NOISE) -> SurfaceTable:
    generator = np.random.default_rng(0)
    cells = [cell for cell in SPACE if not even or cell.total % 2 == 0]
    means = np.array([truth(cell) for cell in cells])
    accuracies = means[:, None] + noise * generator.standard_normal((len(cells), seeds))
    costs = np.array([100.0 - 5 * cell.n_attn for cell in cells])
    return SurfaceTable(SPACE, cells, accuracies, costs, {})


def recorded(seed: int) -> list[WalkTrial]:
    """The published walks with inheritance, which does a little good."""
    walks, generator = walks_of(SPACE, 1), np.random.default_rng([seed, 1])
    return [
        WalkTrial(
            step.name, walk[step.step - 1].name if step.step else None, step.cell,
            truth(step.cell) + 0.001 * step.step + NOISE * generator.standard_normal(), 1.0,
        )
        for walk in walks
        for step in walk
    ]  # fmt: skip


TABLE = surface()
WALKS = [recorded(0), recorded(1)]


def run(name: str, **changes):
    settings = {"seed": 0, "workers": 1, "max_trials": 12, "walks": WALKS} | changes
    return replay(changes.pop("table", TABLE), name, BUDGETS, **{k: v for k, v in settings.items() if k != "table"})


@pytest.mark.parametrize("name", STRATEGIES)
class TestEveryStrategy:
    def test_pays_for_every_trial_and_never_for_more(self, name):
        trace = run(name)
        assert len(trace.cost) <= 12
        assert (np.diff(trace.cost) > 0).all()
        assert trace.cost[-1] <= 12
        assert (trace.regret >= 0).all()

    def test_is_the_same_again_with_the_same_seed(self, name):
        np.testing.assert_array_equal(run(name, seed=3).regret, run(name, seed=3).regret)

    def test_more_workers_take_less_time_for_the_same_cost(self, name):
        one, four = run(name), run(name, workers=4)
        assert one.time[-1] == pytest.approx(one.cost[-1])
        assert four.time[-1] < 0.6 * four.cost[-1]

    def test_takes_a_table_with_every_other_cell(self, name):
        assert np.isfinite(run(name, table=surface(even=True), max_trials=8).regret).all()


@pytest.mark.parametrize("name", ["map", "gp-lattice", "grid/lines", "tpe/lines"])
def test_enough_trials_find_the_best_cells_of_a_quiet_surface(name):
    trace = run(name, table=surface(noise=1e-5), max_trials=26)
    assert trace.regret[-1].max() < 0.1 * POINT


def test_the_grid_by_lines_tries_every_feasible_cell_once_and_stops():
    feasible = {cell for budget in BUDGETS for cell in budget.cells}
    assert len(run("grid/lines", max_trials=100).cost) == len(feasible)


class TestJudge:
    def test_never_judges_by_what_was_observed(self):
        table = surface(3)
        table.accuracies[:, 0] = -1e6
        judge = Judge(table, BUDGETS, seed=0)
        assert judge.observe(Cell(0, 4)) == -1e6
        assert (judge.regret([Cell(0, 4), Cell(0, 6)]) < 1).all()

    def test_the_observed_seed_rotates(self):
        first = [Judge(TABLE, BUDGETS, seed).observe(Cell(2, 2)) for seed in range(4)]
        assert first == TABLE.accuracies[TABLE.cells.index(Cell(2, 2))].tolist()

    def test_after_every_seed_was_observed_the_trials_are_dealt_anew_and_none_is_lost(self):
        again = dealt(TABLE, 1)
        assert (again.accuracies != TABLE.accuracies).any()
        np.testing.assert_array_equal(np.sort(again.accuracies), np.sort(TABLE.accuracies))
        row = TABLE.accuracies[TABLE.cells.index(Cell(2, 2))]
        assert sorted(Judge(TABLE, BUDGETS, seed).observe(Cell(2, 2)) for seed in range(4, 8)) == sorted(row)
        assert Judge(TABLE, BUDGETS, 4).observe(Cell(2, 2)) == again.accuracies[TABLE.cells.index(Cell(2, 2)), 0]

    def test_cells_with_fewer_trials_keep_theirs_first(self):
        table = surface(4)
        table.accuracies[:30, 2:] = np.nan
        assert np.isnan(dealt(table, 3).accuracies[:30, 2:]).all()
        assert np.isfinite(dealt(table, 3).accuracies[:30, :2]).all()

    def test_a_repeated_cell_draws_unseen_seeds_then_noise_of_the_tables_size(self):
        judge = Judge(TABLE, BUDGETS, seed=1)
        row = TABLE.accuracies[TABLE.cells.index(Cell(1, 1))]
        assert sorted(judge.observe(Cell(1, 1)) for _ in range(4)) == sorted(row)
        more = np.array([judge.observe(Cell(1, 1)) for _ in range(500)])
        assert more.mean() == pytest.approx(row.mean(), abs=4e-4)
        assert more.std() == pytest.approx(table_noise(TABLE), rel=0.15)

    def test_the_floor_is_the_regret_of_knowing_all_that_can_be_observed(self):
        assert Judge(surface(noise=0), BUDGETS, 0).floor.max() == 0
        assert Judge(surface(noise=0.02), BUDGETS, 0).floor.max() > 0

    def test_noise_is_that_of_the_table(self):
        assert table_noise(surface(6)) == pytest.approx(NOISE, rel=0.15)

    def test_one_seed_is_not_enough(self):
        with pytest.raises(ValueError, match="at least two seeds"):
            Judge(surface(1), BUDGETS, 0)


def test_a_curve_averages_replays_and_says_what_reaching_a_target_costs():
    groups = compare(TABLE, ["map"], BUDGETS, seeds=6, workers=1, max_trials=14)["map"]
    found = mean_curve("map", groups, np.arange(1.0, 15.0))
    assert (found.low <= found.mean).all()
    assert (found.mean <= found.high).all()
    assert found.mean[-1] < found.mean[0]
    assert found.cost_to(1e9) == found.cost[0]
    assert found.cost_to(-1e9) == float("inf")
    assert 0 <= found.hit_rate.min() <= found.hit_rate.max() <= 1


def test_cost_to_a_target_counts_from_where_the_curve_stays_below():
    trace = run("walk")
    grid = np.arange(1.0, 5.0)
    found = mean_curve("made", [[trace]], grid)
    object.__setattr__(found, "mean", np.array([0.001, 0.005, 0.001, 0.001]))
    assert found.cost_to(0.25) == 3.0


def test_the_published_walks_are_the_published_cells():
    cells = published_walks(RatioSpace(12, 12))
    assert len(cells) == 22
    assert cells[:9] == [Cell(n, 0) for n in range(9)]
    assert cells[-5:] == [Cell(1, 1), Cell(1, 2), Cell(2, 2), Cell(2, 3), Cell(3, 3)]


def test_walk_decides_as_map_does_on_its_samples():
    space = RatioSpace(12, 12)
    cells = list(space)
    accuracies = np.array([[0.9 - 0.001 * (c.n_attn - 2) ** 2 - 0.0005 * (c.n_act - 3) ** 2] * 2 for c in cells])
    table = SurfaceTable(space, cells, accuracies, np.ones(len(cells)), {})
    trace = replay(table, "walk", unit_goals(SPACE, 8, 10), seed=0, workers=1, max_trials=30)
    assert len(trace.cost) == 22
    assert trace.regret[-1].max() < 1e-9


def test_a_strategy_knows_the_dense_models_accuracy_where_the_table_does(monkeypatch):
    known, make = [], STRATEGIES["map"]
    monkeypatch.setitem(STRATEGIES, "map", lambda problem: known.append(problem.dense) or make(problem))
    run("map", table=replace(TABLE, provenance={"dense_accuracy": 0.9, "start": "dense"}))
    run("map", table=replace(TABLE, provenance={"dense_accuracy": 0.9, "start": "probe"}))
    run("map")
    assert known == [0.9, None, None]


def test_before_any_trial_a_probe_decides_by_what_is_expected_of_it():
    by_attn = np.array([-0.01 * cell.n_attn for cell in SPACE])
    by_act = np.array([-0.01 * cell.n_act for cell in SPACE])
    seen = Observed(Problem(SPACE, BUDGETS, lambda cell: 1.0, 0), 2)
    for expected, chosen in ((None, [Cell(0, 4), Cell(0, 6)]), (by_act, [Cell(4, 0), Cell(6, 0)])):
        seen.take_hints([Hint(2 * by_attn + by_act, expected=expected)])
        assert seen.best_by_posterior() == chosen


def probes(seeds: int = 2, noise: float = 0.003) -> ProbeSeeds:
    generator, cells = np.random.default_rng(5), list(SPACE)
    truths = np.array([truth(cell) - 0.05 for cell in cells])
    accuracies = truths[:, None] + noise * generator.standard_normal((len(cells), seeds))
    return ProbeSeeds(cells, accuracies, None, np.full(len(cells), 2.0), 150.0, epochs=2)


class TestProbe:
    def test_its_training_and_evaluation_count_from_the_first_trial_on(self):
        trace = run("map", probes=probes())
        assert trace.upfront == pytest.approx((150 + 2 * RunConfig.probe_cells) / 100)
        assert trace.cost[0] == pytest.approx(trace.upfront)
        assert run("map/no-probe", probes=probes()).upfront == 0

    def test_its_losses_are_believed_rather_than_its_accuracies(self):
        by_accuracy = run("map", probes=probes(noise=0.02))
        made = probes(noise=0.02)
        losses = np.array([[3 * (0.95 - truth(cell))] * 2 for cell in made.cells])
        by_loss = run("map", probes=replace(made, losses=losses))
        assert by_loss.regret[0].mean() < by_accuracy.regret[0].mean()

    def test_one_that_is_too_dear_is_left_out_unless_it_is_asked_for(self):
        dear = replace(probes(), training_cost=100 * RunConfig.probe_max_cost)
        left_out, asked_for, without = (run(name, probes=dear) for name in ("map", "map/probe", "map/no-probe"))
        assert left_out.upfront == 0
        assert asked_for.upfront > RunConfig.probe_max_cost
        assert np.array_equal(left_out.cost, without.cost)
        assert np.array_equal(left_out.regret, without.regret)

    def test_beside_trials_it_takes_a_worker_and_no_more_time_than_it_needs(self):
        alone, beside = run("map", probes=probes()), run("map", probes=probes(), workers=2)
        assert alone.time[0] == pytest.approx(alone.upfront)
        assert beside.time[0] < beside.upfront
        assert beside.time[-1] < alone.time[-1]

    def test_a_curve_begins_once_the_probe_is_paid_for(self):
        found = mean_curve("map", [[run("map", probes=probes())]], np.arange(1.0, 6.0))
        assert np.isnan(found.mean).tolist() == [True, False, False, False, False]

    def test_a_curve_over_time_begins_with_the_first_decision(self):
        for trace in (run("map", probes=probes()), run("map/no-probe"), run("map", probes=probes(), workers=2)):
            grid = np.array([0.5, 0.99, 1.01, 3.0]) * trace.time[0]
            found = mean_curve("map", [[trace]], grid, "time")
            assert np.isnan(found.mean).tolist() == [True, True, False, False]

    def test_a_good_one_helps_from_the_start(self):
        with_probe = np.mean([run("map", seed=s, probes=probes()).regret[0].mean() for s in range(6)])
        without = np.mean([run("map/no-probe", seed=s).regret[0].mean() for s in range(6)])
        assert with_probe < 0.5 * without


def test_a_right_prior_helps_and_a_wrong_one_costs_little():
    right = np.array([truth(cell) for cell in SPACE])
    wrong = -right
    regrets = {
        name: np.mean([run("map/prior", seed=s, prior=prior, max_trials=14).regret.mean(axis=1) for s in range(6)], 0)
        for name, prior in (("right", right), ("wrong", wrong), ("none", None))
    }
    assert regrets["right"][:3].mean() < regrets["none"][:3].mean()
    assert regrets["wrong"][-1] < regrets["none"][-1] + 0.3 * POINT


def test_one_budget_at_a_time_is_one_replay_a_budget():
    found = compare(TABLE, ["map/no-probe"], BUDGETS, seeds=2, workers=1, max_trials=4, each=True)["map/no-probe"]
    assert [len(group) for group in found] == [2, 2]
    assert all(trace.regret.shape[1] == 1 for group in found for trace in group)
    assert all((trace.cost <= 4).all() for group in found for trace in group)


def test_replays_in_processes_of_their_own_are_the_same():
    alone, beside = (
        compare(TABLE, ["map/no-probe", "tpe/lines"], BUDGETS, seeds=2, workers=2, max_trials=5, processes=processes)
        for processes in (1, 2)
    )
    assert alone.keys() == beside.keys()
    for name, groups in alone.items():
        for group, other in zip(groups, beside[name], strict=True):
            assert [trace.regret.tolist() for trace in group] == [trace.regret.tolist() for trace in other]


def test_slow_samplers_have_fewer_replays_and_are_compared_seed_by_seed_with_the_others(monkeypatch):
    monkeypatch.setattr("dpt_search.replays.SLOW_SEEDS", 2)
    found = compare(TABLE, ["grid/square", "gp/square"], BUDGETS, seeds=4, workers=1, max_trials=3)
    assert {name: len(groups) for name, groups in found.items()} == {"grid/square": 4, "gp/square": 2}
    grid, gp = (mean_curve(name, groups, np.array([3.0])) for name, groups in found.items())
    mean, low, high = gp.behind(grid, 0)
    assert mean == pytest.approx(np.mean(gp.replays[:, 0] - grid.replays[:2, 0]))
    assert low <= mean <= high


def test_the_surface_believed_in_is_judged_by_its_order_on_the_lines():
    assert run("map/no-probe", table=surface(noise=1e-5), max_trials=26).tau > 0.85
    assert np.isnan(run("grid/lines").tau)


def test_trials_that_failed_leave_every_replay_a_number():
    table = surface(3, even=True)
    table.accuracies[table.cells.index(Cell(2, 2)), 1:] = np.nan
    table.accuracies[table.cells.index(Cell(0, 4)), 0] = np.nan
    table.accuracies[table.cells.index(Cell(3, 1))] = np.nan
    table.costs[table.cells.index(Cell(3, 1))] = np.nan
    for seed in range(3):
        judge = Judge(table, BUDGETS, seed)
        assert all(np.isfinite(judge.observe(cell)) and np.isfinite(judge.cost(cell)) for cell in SPACE)
        assert np.isfinite(run("map/no-probe", table=table, seed=seed).regret).all()
