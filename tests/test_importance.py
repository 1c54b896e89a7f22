"""The conditional ranking, which looks again after every removal; that of a single pass is in test_engine."""

from dataclasses import replace

import pytest
import torch
from conftest import SIDE, loud
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import family_of
from search_spaces.plan import PruningPlan, Unit
from trainables.data import View, load_images
from trainables.dense import build_model
from trainables.importance import _next_kind, importance, rank
from trainables.tasks import RankTask

CPU = torch.device("cpu")
VIEW = View((1, SIDE, SIDE), (0.4,), (0.25,), "bicubic", 1.0)


@pytest.fixture(scope="module")
def images(tiny_data):
    return load_images(tiny_data, "train", VIEW, 0, limit=96)


@pytest.fixture(scope="module")
def task(tiny, tiny_data):
    return RankTask(tiny, tiny_data, 0, "cpu", 1, "zero", batches=2, method="conditional")


def loud_tiny(tiny):
    """A model whose layers do enough for their order to change as others go."""
    model = build_model(tiny, seed=3)
    torch.manual_seed(0)
    return loud(model)


def test_each_unit_that_goes_is_the_least_important_of_its_kind_in_the_model_that_is_left(tiny, images):
    """Removal itself is the reference: in the pruned model the units left have that importance, and none has less."""
    model, gone = loud_tiny(tiny), []
    found = importance(model, images, CPU, 2, "zero", method="conditional")
    for unit, told in found.items():
        pruned = family_of(model).remove(loud_tiny(tiny), PruningPlan.of(gone), "zero")
        left = {u: v for u, v in importance(pruned, images, CPU, 2, "zero").items() if u.kind == unit.kind}
        assert told == pytest.approx(left[unit], rel=1e-3, abs=1e-6)
        assert left[unit] <= min(left.values()) * (1 + 1e-3)
        gone.append(unit)
    assert set(gone) == set(family_of(model).units(model))


def test_the_order_depends_on_what_went_before(tiny, images):
    at_once, model = importance(loud_tiny(tiny), images, CPU, 2, "zero"), loud_tiny(tiny)
    one_by_one = importance(model, images, CPU, 2, "zero", method="conditional")
    orders = [[u for u in one_by_one if u.kind == kind] for kind in ("attn", "act")]
    plain = [sorted((u for u in at_once if u.kind == kind), key=lambda u: at_once[u]) for kind in ("attn", "act")]
    assert orders != plain
    # The first of the kind that goes first had nothing before it.
    assert orders[0][0] == plain[0][0]


def test_the_kinds_take_turns_and_the_model_is_put_back(tiny, images):
    model = loud_tiny(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = importance(model, images, CPU, 1, "zero", method="conditional")
    assert [unit.kind for unit in found] == ["attn", "act"] * 4
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@given(st.integers(0, 7), st.integers(0, 13))
def test_turns_are_in_proportion(n_attn, n_act):
    units = [*(Unit("attn", i) for i in range(n_attn)), *(Unit("act", i) for i in range(n_act))]
    gone: list[Unit] = []
    while len(gone) < len(units):
        kind = _next_kind(units, gone)
        gone.append(next(unit for unit in units if unit.kind == kind and unit not in gone))
        attn = sum(unit.kind == "attn" for unit in gone)
        if n_attn and n_act:
            assert abs(attn / n_attn - (len(gone) - attn) / n_act) <= 1 / min(n_attn, n_act) + 1e-9


def test_a_ranking_keeps_its_layout_and_is_the_same_again(task):
    found = rank(task)
    assert found.keys() == {"method", "attn", "act", "importance"}
    assert found["method"] == "conditional"
    for kind in ("attn", "act"):
        assert sorted(found[kind]) == [0, 1, 2, 3]
        assert len(found["importance"][kind]) == 4
        assert all(value > 0 for value in found["importance"][kind])
    assert found == rank(task)


def test_a_model_with_one_kind_of_unit_is_ranked_too(tiny, tiny_data, task):
    from search_spaces.timm_compat import timm

    gated = replace(tiny, kwargs={**tiny.kwargs, "mlp_layer": timm.layers.GluMlp})
    found = rank(replace(task, model=gated))
    assert sorted(found["attn"]) == [0, 1, 2, 3]
    assert found["act"] == found["importance"]["act"] == []
