"""Budgets of every kind, the cells that meet them, and their fronts."""

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from search_spaces.budgets import Budget, parse_budgets
from search_spaces.costs import Cost, UnitCosts
from search_spaces.goals import CellCosts, Measured, feasible, front, goals, unit_goals
from search_spaces.plan import Ranking, Unit
from search_spaces.ratios import Cell, RatioSpace

spaces = st.builds(RatioSpace, st.integers(0, 14), st.integers(0, 14))
speedups = st.floats(1.0, 4.0)
any_budget = st.one_of(
    st.builds(Budget, st.integers(0, 99)),
    st.builds(Budget, speedups, st.just("speedup"), st.integers(1, 999)),
    st.builds(Budget, st.floats(1e-3, 1e12), st.sampled_from(("macs", "params"))),
)


@st.composite
def cell_costs(draw, lowest=0.0):
    """Costs of a ranking's cells; each unit saves at least `lowest` of the dense model's 300."""
    attn, act = (tuple(draw(st.permutations(range(draw(st.integers(0, 5)))))) for _ in range(2))
    units = [*(Unit("attn", i) for i in attn), *(Unit("act", i) for i in act)]
    one = st.floats(lowest, 25.0)
    saved = {u: Cost(draw(one), draw(one), {1: draw(one), 64: draw(one)}) for u in units}
    spreads = {u: {1: draw(st.floats(0, 3)), 64: 0.0} for u in units}
    return CellCosts(Ranking(attn, act), UnitCosts(Cost(300.0, 300.0, {1: 300.0, 64: 300.0}), saved, "abacus", spreads))


@st.composite
def costs_and_limit(draw, lowest=0.0):
    """Costs, and a budget about as strict as what one of the cells costs."""
    costs = draw(cell_costs(lowest))
    near = costs.costs.of(costs.ranking.plan(draw(st.sampled_from(list(costs.ranking.space)))))
    factor, quantity = (
        draw(st.sampled_from((1.0, 0.9, 1.02, 1.1))),
        draw(st.sampled_from(("speedup", "macs", "params"))),
    )
    if quantity == "speedup":
        batch = draw(st.sampled_from((1, 64)))
        return costs, Budget(max(1.0, 300.0 / near.seconds[batch] / factor), "speedup", batch)
    left = factor * (near.macs if quantity == "macs" else near.params)
    return costs, Budget(min(1.0, left / 300.0) if draw(st.booleans()) else max(2.0, left), quantity)


def met(budget: Budget, costs: CellCosts, most: Cell | None = None) -> list[Cell]:
    """The cells that meet a budget; none where it is out of reach."""
    try:
        return feasible(budget, costs.ranking.space, costs, most)
    except ValueError:
        return []


def smaller(cell: Cell) -> list[Cell]:
    return [Cell(a, g) for a, g in ((cell.n_attn - 1, cell.n_act), (cell.n_attn, cell.n_act - 1)) if min(a, g) >= 0]


def is_within(one: Cell, other: Cell) -> bool:
    return one.n_attn <= other.n_attn and one.n_act <= other.n_act


@given(st.lists(any_budget, min_size=1, max_size=8))
def test_budgets_are_read_back_from_their_text(budgets):
    found = parse_budgets(" ".join(map(str, budgets)))
    assert set(found) == set(budgets)
    assert len(found) == len(set(found))
    assert parse_budgets("; ".join(map(str, found))) == found
    for one, other in itertools.pairwise(found):
        if (one.quantity, one.batch) == (other.quantity, other.batch):
            assert one.strictness < other.strictness


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("units=8", "units=8"),
        ("units=8,4, 6", "units=4 units=6 units=8"),
        (" units = 4 , 6;speedup=1.5,1.3", "units=4 units=6 speedup=1.3 speedup=1.5"),
        ("speedup@64=1.50 speedup@1=1.3", "speedup=1.5 speedup@1=1.3"),
        ("macs=0.6,0.8", "macs=0.8 macs=0.6"),
        ("macs=1.5G params=40M,22050000,4k", "macs=1.5G params=40M params=22.05M params=4K"),
    ],
)
def test_the_syntax_of_budgets(text, expected):
    assert " ".join(map(str, parse_budgets(text))) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("faster", "unknown budget 'faster'; write units=8, speedup=1.5"),
        ("units@2=4", "unknown budget 'units@2=4'"),
        ("units=4 speed=2", "unknown budget 'speed=2'"),
        ("speedup=0.5", "a speedup is at least 1"),
        ("speedup@0=2", "at a batch size of at least 1"),
        ("speedup=2M", "cannot read budget 'speedup=2M'"),
        ("speedup=nan", "cannot read budget"),
        ("macs=0", "no model is left without macs"),
        ("params=-3", "cannot be negative"),
        ("params=inf", "cannot read budget"),
    ],
)
def test_what_is_no_budget_is_refused_in_one_line(text, says):
    with pytest.raises(ValueError) as raised:
        parse_budgets(text)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@given(costs_and_limit())
def test_feasible_cells_are_those_whose_plan_costs_no_more_than_the_limit(pair):
    costs, budget = pair
    limit = budget.limit(costs.costs.dense)
    within = [c for c in costs.ranking.space if budget.of(costs.costs.of(costs.ranking.plan(c))) <= limit + 1e-6]
    assert set(met(budget, costs)) <= set(within)
    clearly = [c for c in within if budget.of(costs.costs.of(costs.ranking.plan(c))) < limit - 1e-6]
    assert set(clearly) <= set(met(budget, costs))


@given(costs_and_limit())
def test_feasible_cells_are_upward_closed_where_every_unit_saves(pair):
    costs, budget = pair
    found = set(met(budget, costs))
    for cell in found:
        for other in costs.ranking.space:
            assert not is_within(cell, other) or other in found


@given(costs_and_limit(lowest=-5.0))
def test_a_front_is_minimal_and_below_every_feasible_cell(pair):
    """Also where a noisy profile says that a unit's removal makes the model slower."""
    costs, budget = pair
    found = met(budget, costs)
    assume(found)
    (goal,) = goals([budget], costs.ranking.space, costs)
    assert goal.cells == front(found)
    assert list(goal.cells) == sorted(set(goal.cells))
    for cell in goal.cells:
        assert cell in found
        assert not set(smaller(cell)) & set(found)
    for cell in found:
        assert any(is_within(least, cell) for least in goal.cells)


@given(costs_and_limit())
def test_no_cell_of_a_front_removes_all_that_another_does(pair):
    costs, budget = pair
    least = front(met(budget, costs))
    assert not [(one, other) for one in least for other in least if one != other and is_within(one, other)]


@given(cell_costs(), speedups, speedups)
def test_a_stricter_budget_has_fewer_cells_and_goes_no_less_deep(costs, one, other):
    mild, strict = (Budget(value, "speedup", 64) for value in sorted((one, other)))
    assert set(met(strict, costs)) <= set(met(mild, costs))
    for cell in front(met(strict, costs)):
        assert any(is_within(least, cell) for least in front(met(mild, costs)))


@given(spaces, st.integers(0, 28))
def test_a_line_is_its_own_front(space, units):
    assume(units <= space.total)
    (goal,) = unit_goals(space, units)
    assert list(goal.cells) == space.line(units)
    assert (str(goal), goal.depth) == (f"units={units}", units)


@given(spaces, st.integers(0, 40))
def test_a_budget_of_units_is_its_line_or_refused_naming_the_most(space, total):
    if total <= space.total:
        assert feasible(Budget(total), space) == space.line(total)
        return
    with pytest.raises(ValueError) as raised:
        unit_goals(space, total)
    assert f"units={total} " in str(raised.value)
    assert f"at most units={space.total}" in str(raised.value)


@given(costs_and_limit(), st.integers(0, 6), st.integers(0, 6))
def test_limits_on_kinds_cut_the_feasible_cells_and_nothing_else(pair, attn, act):
    costs, budget = pair
    most = Cell(attn, act)
    assert met(budget, costs, most) == [cell for cell in met(budget, costs) if is_within(cell, most)]
    space = costs.ranking.space
    line = [cell for cell in space.line(4) if is_within(cell, most)]
    assert met(Budget(4), costs, most) == line


@given(cell_costs(), st.lists(any_budget, min_size=1, max_size=5))
def test_mixed_budgets_are_each_what_they_are_alone(costs, budgets):
    reachable = [b for b in budgets if b.batch in (0, 1, 64) and met(b, costs)]
    together = goals(reachable, costs.ranking.space, costs)
    assert [str(goal) for goal in together] == [str(budget) for budget in reachable]
    for budget, goal in zip(reachable, together, strict=True):
        assert (goal,) == goals([budget], costs.ranking.space, costs)


@given(cell_costs())
def test_what_is_out_of_reach_is_refused_with_what_can_be_had(costs):
    space = costs.ranking.space
    for text in ("speedup=999", "macs=0.00001", "params=0.00001"):
        (budget,) = parse_budgets(text)
        with pytest.raises(ValueError, match=r"^no plan meets budget .* ask for at (most|least) ") as raised:
            feasible(budget, space, costs)
        (possible,) = parse_budgets(str(raised.value).split()[-1])
        assert possible.quantity == budget.quantity
        assert feasible(possible, space, costs)


def test_a_batch_size_that_was_not_timed_is_refused_with_those_that_were():
    costs = CellCosts(Ranking((0,), ()), UnitCosts(Cost(1, 1, {1: 1.0, 64: 2.0}), {Unit("attn", 0): ONE}, "abacus"))
    with pytest.raises(ValueError, match=r"budget speedup@8=1\.5: speed is known at batch 1, 64 only"):
        feasible(Budget(1.5, "speedup", 8), costs.ranking.space, costs)
    with pytest.raises(ValueError, match=r"budget macs=0\.5 needs the costs of units"):
        feasible(Budget(0.5, "macs"), costs.ranking.space)


ONE = Cost(0.1, 0.1, {1: 0.1, 64: 0.1})
FOUR = Ranking((0, 1, 2, 3), ())


def four(spread: float, **measured: float) -> CellCosts:
    """Four attentions that save a tenth each, so speedups of 1.11, 1.25, 1.43 and 1.67."""
    units = [Unit("attn", i) for i in range(4)]
    spreads = {unit: {64: spread} for unit in units}
    costs = UnitCosts(Cost(1, 1, {64: 1.0}), dict.fromkeys(units, Cost(0.1, 0.1, {64: 0.1})), "abacus", spreads)
    timed = {"attn:" + k[1:].replace("_", ","): {64: Measured(v, v - 0.005)} for k, v in measured.items()}
    return CellCosts(FOUR, costs, timed)


@pytest.mark.parametrize(
    ("value", "spread", "is_sure"),
    [(1.25, 0.0, True), (1.24, 0.01, False), (1.20, 0.01, True), (1.26, 0.01, False), (1.35, 0.01, True)],
)
def test_a_cell_within_its_spread_of_the_limit_is_not_sure(value, spread, is_sure):
    found = four(spread).standing(Budget(value, "speedup", 64), Cell(2, 0))
    assert (found.is_sure, found.measured) == (is_sure, None)
    assert found.meets == (value <= 1.25)


def test_what_was_measured_counts_and_the_next_cell_takes_its_place():
    budget = Budget(1.24, "speedup", 64)
    assert front(feasible(budget, FOUR.space, four(0.01))) == (Cell(2, 0),)
    failed = four(0.01, p0_1=1.22)
    assert front(feasible(budget, FOUR.space, failed)) == (Cell(3, 0),)
    assert failed.standing(budget, Cell(2, 0)).is_sure
    # The median is no promise: the low end of the interval has to reach it.
    assert front(feasible(budget, FOUR.space, four(0.01, p0_1=1.243))) == (Cell(3, 0),)
    # And one that was predicted to fall short and does not.
    assert front(feasible(Budget(1.26, "speedup", 64), FOUR.space, four(0.01, p0_1=1.27))) == (Cell(2, 0),)


def test_an_impossible_budget_counts_what_was_measured():
    everything = four(0.0, p0_1_2_3=1.5)
    with pytest.raises(ValueError, match=r"at most speedup=1\.49$"):
        feasible(Budget(1.6, "speedup", 64), FOUR.space, everything)


def test_a_plan_whose_units_seem_to_save_everything_meets_nothing():
    saved = dict.fromkeys((Unit("attn", i) for i in range(4)), Cost(0.1, 0.1, {64: 0.3}))
    costs = CellCosts(FOUR, UnitCosts(Cost(1, 1, {64: 1.0}), saved, "abacus"))
    assert math.isnan(costs.standing(Budget(1.5, "speedup", 64), Cell(4, 0)).predicted)
    assert feasible(Budget(1.5, "speedup", 64), FOUR.space, costs) == [Cell(2, 0), Cell(3, 0)]
    with pytest.raises(ValueError, match=r"at most speedup=\d+(\.\d+)?$"):
        feasible(Budget(50.0, "speedup", 64), FOUR.space, costs)
