"""Every family against a reference that knows nothing of our verbs: hooks that leave out what a plan removes."""

import copy
import re

import pytest
import torch
from conftest import loud
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import Member, skipping
from zoo_members import MEMBERS, RARER

from search_spaces import family_of, offered
from search_spaces.plan import PruningPlan
from trainables.group import Group
from trainables.timing import count_macs

BUILT: dict[str, torch.nn.Module] = {}


PARAMS = [pytest.param(m, id=m.key, marks=[pytest.mark.slow] if m in RARER else []) for m in MEMBERS]


@pytest.fixture(params=PARAMS)
def member(request):
    return request.param


def built(member: Member) -> torch.nn.Module:
    """Return a member, not to be changed, whose every weight matters, scales and biases too."""
    if member.key not in BUILT:
        torch.manual_seed(0)
        BUILT[member.key] = loud(member.build().eval())
    return BUILT[member.key]


def logits(model: torch.nn.Module, member: Member) -> torch.Tensor:
    pixels = torch.randn(2, member.chans, member.side, member.side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(pixels)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_units_are_as_many_as_there_must_be(member):
    offer = offered(built(member))
    assert (len(offer.attn), len(offer.act)) == (member.n_attn, member.n_act)
    assert all(reason[0].isupper() for reason in offer.refused.values())


@settings(max_examples=20)
@given(data=st.data())
def test_gates_removal_and_merging_are_what_hooks_leave(member, data):
    model = copy.deepcopy(built(member))
    family = family_of(model)
    plan = PruningPlan.of(data.draw(st.sets(st.sampled_from(family.units(model)))))
    with skipping(model, member, plan):
        expected = logits(model, member)
    with family.gates(model, "zero") as gates, torch.no_grad():
        for unit in plan.units:
            gates[unit].zero_()
        gated = logits(model, member)
    assert difference(gated, expected) <= 1e-5
    # In any order, in one step or more, some of them empty.
    step_of = {unit: data.draw(st.integers(0, 3)) for unit in plan.units}
    for step in range(4):
        family.remove(model, PruningPlan.of(unit for unit in plan.units if step_of[unit] == step), "zero")
    assert difference(logits(model, member), expected) <= 1e-5
    assert difference(logits(family.merge(model), member), expected) <= 1e-4


def test_gates_leave_a_model_as_they_found_it(member):
    model = copy.deepcopy(built(member))
    before, modules = logits(model, member), list(model.modules())
    with family_of(model).gates(model, "zero"):
        assert difference(logits(model, member), before) <= 1e-5
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert torch.equal(logits(model, member), before)


def test_the_units_macs_add_up_and_what_is_left_learns(member):
    dense = built(member)
    family, size = family_of(dense), (member.chans, member.side, member.side)

    def macs(plan: PruningPlan) -> float:
        model = copy.deepcopy(dense)
        return count_macs(family.merge(family.remove(model, plan, "zero")), size)

    units = family.units(dense)
    whole = count_macs(dense, size)
    saved = [whole - macs(PruningPlan.of([unit])) for unit in units]
    assert min(saved) > 0
    assert sum(saved) == pytest.approx(whole - macs(PruningPlan.of(units)))
    model = family.remove(copy.deepcopy(dense), PruningPlan.of(units[::2]), "zero").train()
    outputs = model(torch.randn(2, member.chans, member.side, member.side))
    sum(each.square().sum() for each in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert [name for name in silent if not re.search(member.orphans, name)] == []
    again = family.remove(member.build(), PruningPlan.of(units[::2]), "zero")
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, member), logits(model, member))


@pytest.mark.parametrize("attention", ["identity", "double"])
@settings(max_examples=4)
@given(data=st.data())
def test_what_else_may_stay_of_an_attention_is_what_its_gates_leave(member, attention, data):
    model = copy.deepcopy(built(member))
    family = family_of(model)
    plan = PruningPlan.of(data.draw(st.sets(st.sampled_from(family.units(model)))))
    with family.gates(model, attention) as gates, torch.no_grad():
        for unit in plan.units:
            gates[unit].zero_()
        gated = logits(model, member)
    removed = logits(family.remove(model, plan, attention), member)
    assert difference(gated, removed) <= 1e-5
    assert difference(logits(family.merge(model), member), removed) <= 1e-4


def test_weights_that_nothing_uses_any_more_do_not_stop_a_training_on_several_workers(tmp_path):
    shared = next(member for member in MEMBERS if member.key == "beit_shared")
    model = copy.deepcopy(built(shared)).train()
    family = family_of(model)
    family.remove(model, PruningPlan.of(unit for unit in family.units(model) if unit.kind == "attn"), "zero")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = Group(world=2).distributed(model)
        for _ in range(3):
            wrapped(torch.randn(2, 1, shared.side, shared.side)).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert model.rel_pos_bias.relative_position_bias_table.grad is None
    assert model.blocks[0].mlp.fc1.weight.grad is not None
