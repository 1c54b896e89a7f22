"""Plans, rankings, cells, budgets and costs: the words everything else is said in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import BadInput, UnsupportedModel, family_of
from search_spaces.budgets import parse_budgets
from search_spaces.costs import Cost, UnitCosts
from search_spaces.plan import PruningPlan, Ranking, Unit
from search_spaces.ratios import Cell, RatioSpace, within

indices = st.lists(st.integers(0, 40), max_size=12)
plans = st.builds(lambda attn, act: PruningPlan(tuple(attn), tuple(act)), indices, indices)
spaces = st.builds(RatioSpace, st.integers(0, 14), st.integers(0, 14))
orders = st.integers(0, 12).flatmap(lambda n: st.permutations(range(n)).map(tuple))
rankings = st.builds(Ranking, orders, orders)


@given(plans)
def test_a_plan_is_read_back_from_its_text(plan):
    assert PruningPlan.parse(str(plan)) == plan
    assert str(PruningPlan.parse(str(plan))) == str(plan)


@given(indices, indices, st.randoms(use_true_random=False))
def test_order_and_repetition_of_units_do_not_matter(attn, act, random):
    units = [Unit("attn", i) for i in attn] + [Unit("act", i) for i in act]
    shuffled = units * 2
    random.shuffle(shuffled)
    plan, other = PruningPlan.of(units), PruningPlan.of(shuffled)
    assert plan == other
    assert hash(plan) == hash(other)
    assert str(plan) == str(other)
    assert plan == PruningPlan.parse(" ".join(str(u) for u in shuffled))


@given(plans)
def test_units_length_and_cell_of_a_plan_agree(plan):
    assert PruningPlan.of(plan.units) == plan
    assert len(plan) == len(plan.units) == plan.cell.total
    assert plan.cell == Cell(len(set(plan.attn)), len(set(plan.act)))


def test_the_text_form_is_the_documented_one():
    assert str(PruningPlan((3, 0), (9, 8, 9))) == "attn:0,3 act:8,9"
    assert str(PruningPlan(act=(2,))) == "act:2"
    for empty in ("", "  ", "dense", " dense "):
        assert PruningPlan.parse(empty) == PruningPlan()
    assert str(PruningPlan()) == "dense"


@pytest.mark.parametrize("text", ["attn", "attn:", "attn:a", "mlp:3", "attn:1;2", "attn:-1", "act:1,,2", "dense act:1"])
def test_a_text_that_is_no_plan_is_refused_with_the_text_and_the_form(text):
    with pytest.raises(ValueError) as raised:
        PruningPlan.parse(text)
    assert repr(text) in str(raised.value)
    assert "attn:0,3 act:8,9" in str(raised.value)


def test_negative_units_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="act:-2"):
        PruningPlan((1,), (-2,))
    with pytest.raises(ValueError, match="negative"):
        Unit("attn", -1)
    with pytest.raises(ValueError, match=r"'mlp'.*attn, act"):
        Unit("mlp", 0)
    with pytest.raises(ValueError, match="negative"):
        Cell(-1, 0)


@given(rankings, st.data())
def test_plans_of_a_ranking_are_nested(ranking, data):
    cells = list(ranking.space)
    small, large = (data.draw(st.sampled_from(cells)) for _ in range(2))
    union = Cell(max(small.n_attn, large.n_attn), max(small.n_act, large.n_act))
    assert set(ranking.plan(small).units) <= set(ranking.plan(union).units)
    assert ranking.plan(small).cell == small


@given(rankings, st.data())
def test_a_ranking_knows_its_own_plans_from_others_of_the_same_cell(ranking, data):
    cell = data.draw(st.sampled_from(list(ranking.space)))
    own = ranking.plan(cell)
    other = PruningPlan(data.draw(st.permutations(ranking.attn))[: cell.n_attn], own.act)
    assert own in ranking
    assert (other in ranking) == (other == own)
    assert PruningPlan(range(len(ranking.attn) + 1)) not in ranking


@given(rankings)
def test_a_ranking_removes_its_first_units_first_and_ends_with_all(ranking):
    for count in range(1, len(ranking.attn) + 1):
        added = set(ranking.plan(Cell(count, 0)).attn) - set(ranking.plan(Cell(count - 1, 0)).attn)
        assert added == {ranking.attn[count - 1]}
    everything = ranking.plan(Cell(len(ranking.attn), len(ranking.act)))
    assert everything == PruningPlan(ranking.attn, ranking.act)
    assert ranking.plan(Cell(0, 0)) == PruningPlan()


@given(rankings, st.integers(1, 5))
def test_a_ranking_refuses_a_cell_beyond_its_units(ranking, extra):
    for cell in (Cell(len(ranking.attn) + extra, 0), Cell(0, len(ranking.act) + extra)):
        with pytest.raises(ValueError, match=f"{len(ranking.attn)} attn, {len(ranking.act)} act"):
            ranking.plan(cell)


def test_a_ranking_names_every_unit_once():
    with pytest.raises(ValueError, match="attn:1,2,1"):
        Ranking((1, 2, 1), (0,))


@given(spaces, st.integers(0, 30))
def test_a_line_has_all_cells_of_its_total_and_no_other(space, total):
    line = space.line(total)
    assert line == [cell for cell in space if cell.total == total]
    assert [cell.n_attn for cell in line] == sorted({cell.n_attn for cell in line})


@given(st.lists(st.builds(Cell, st.integers(0, 9), st.integers(0, 9)), max_size=5))
def test_within_some_cells_are_those_that_remove_no_more_of_either_kind(cells):
    by_definition = [c for c in RatioSpace(9, 9) if any(c.n_attn <= o.n_attn and c.n_act <= o.n_act for o in cells)]
    assert within(cells) == by_definition


@given(spaces)
def test_a_space_has_each_of_its_cells_once(space):
    cells = list(space)
    assert len(cells) == len(set(cells)) == len(space)
    assert cells == sorted(cells)
    assert all(cell in space for cell in cells)
    assert Cell(space.n_attn + 1, 0) not in space
    assert Cell(0, space.n_act + 1) not in space
    assert max(cell.total for cell in cells) == space.total


@given(spaces)
def test_ratios_run_from_nothing_to_all(space):
    assert space.ratios(Cell(0, 0)) == (0.0, 0.0)
    assert space.ratios(Cell(space.n_attn, space.n_act)) == (float(space.n_attn > 0), float(space.n_act > 0))
    for cell in space:
        assert all(0 <= ratio <= 1 for ratio in space.ratios(cell))


@pytest.mark.parametrize(
    "text", ["", "8", "units", "units=", "units=a", "units=4,", "units=-1", "layers=8", "units=1.5"]
)
def test_a_text_that_is_no_budget_is_refused_with_the_text_and_the_form(text):
    with pytest.raises(ValueError) as raised:
        parse_budgets(text)
    assert repr(text) in str(raised.value)
    assert "units=8" in str(raised.value)


savings = st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))


@st.composite
def unit_costs(draw):
    """Costs in which the units together save less than the whole."""
    units = [Unit(kind, i) for kind in ("attn", "act") for i in range(draw(st.integers(0, 5)))]
    saved = {unit: Cost(m, p, {1: s, 64: 2 * s}) for unit in units for m, p, s in [draw(savings)]}
    return UnitCosts(Cost(200.0, 300.0, {1: 150.0, 64: 300.0}), saved, "abacus")


@st.composite
def costs_and_plan(draw):
    costs = draw(unit_costs())
    return costs, PruningPlan.of(u for u in costs.saved if draw(st.booleans()))


@given(costs_and_plan())
def test_savings_of_units_add_up(given_both):
    costs, plan = given_both
    cost = costs.of(plan)
    assert cost.macs == pytest.approx(200 - sum(costs.saved[u].macs for u in plan.units))
    assert cost.params == pytest.approx(300 - sum(costs.saved[u].params for u in plan.units))
    for batch, dense in costs.dense.seconds.items():
        assert cost.seconds[batch] == pytest.approx(dense - sum(costs.saved[u].seconds[batch] for u in plan.units))


@given(costs_and_plan())
def test_speedup_starts_at_one_and_grows_with_every_unit(given_both):
    costs, plan = given_both
    assert costs.of(PruningPlan()) == costs.dense
    speedups = [costs.speedup(PruningPlan.of(plan.units[:n]), 64) for n in range(len(plan) + 1)]
    assert speedups[0] == 1
    assert speedups == sorted(speedups)


def test_cost_of_a_unit_that_was_not_measured_is_an_error():
    with pytest.raises(KeyError):
        UnitCosts(Cost(1, 1, {1: 1}), {}, "abacus").of(PruningPlan((0,)))


def test_what_has_no_known_blocks_is_refused():
    with pytest.raises(UnsupportedModel, match="no family describes the blocks of int") as raised:
        family_of(3)
    assert isinstance(raised.value, BadInput)
