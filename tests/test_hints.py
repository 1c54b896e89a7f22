"""What a search starts from: the probe's surface, made whole, and those of earlier runs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpt_search.config import BadConfig, RunConfig
from dpt_search.hints import by_loss, hints_of, prior_surface, resampled, smooth, trained_alone, without_steps
from dpt_search.map_sampler import ratios
from dpt_search.posterior import Hint
from dpt_search.probe_table import write_probe
from dpt_search.store import RunStore
from search_spaces.ratios import Cell, RatioSpace, spread
from trainables.settings import Recipe

SPACE = RatioSpace(6, 8)
INDEX = {cell: i for i, cell in enumerate(SPACE)}


def surface(space: RatioSpace) -> np.ndarray:
    attn, act = ratios(space).T
    return 0.9 - 0.1 * attn - 0.2 * act**2


def test_some_cells_make_the_whole_surface():
    cells = [cell for cell in spread(SPACE, list(SPACE)) if cell.n_attn < 6 and cell.n_act < 8][:25]
    found = smooth(SPACE, cells, surface(SPACE)[[INDEX[cell] for cell in cells]], None, length=1)
    inner = [INDEX[cell] for cell in SPACE if cell.n_attn < 6 and cell.n_act < 8]
    assert np.abs(found.mean - surface(SPACE))[inner].max() < 0.01


@given(st.lists(st.floats(0.1, 3), min_size=3, max_size=16, unique=True), st.floats(0.05, 0.3))
def test_losses_become_accuracies_by_the_line_through_both(losses, slope):
    accuracies = 1 - slope * np.array(losses)
    np.testing.assert_allclose(by_loss(accuracies, np.array(losses)), accuracies, atol=1e-9)


def test_losses_beyond_a_cliff_do_not_bend_the_line():
    losses = np.linspace(0.3, 1.5, 12)
    accuracies = 1 - 0.3 * losses
    told = by_loss(np.r_[accuracies, 0.1, 0.1], np.r_[losses, 12.0, 15.0])
    np.testing.assert_allclose(np.diff(told[:12]), np.diff(accuracies), rtol=0.2)
    assert told.min() >= 0


@pytest.mark.parametrize("losses", [[0.5] * 3, [0.4, 0.5, 0.6], [0.6, 0.5, float("inf")], [float("nan"), 0.5, 0.4]])
def test_losses_that_tell_nothing_of_accuracies_are_left_out(losses):
    accuracies = np.array([0.5, 0.6, 0.7])
    assert by_loss(accuracies, np.array(losses)) is accuracies


def test_a_probe_is_believed_by_its_losses():
    cells = [cell for cell in spread(SPACE, list(SPACE)) if cell.n_attn < 6 and cell.n_act < 8][:25]
    true = surface(SPACE)[[INDEX[cell] for cell in cells]]
    noisy = true + 0.02 * np.random.default_rng(0).standard_normal(len(cells))
    inner = [INDEX[cell] for cell in SPACE if cell.n_attn < 6 and cell.n_act < 8]
    off = [
        np.std((smooth(SPACE, cells, noisy, losses, length=1).mean - surface(SPACE))[inner])
        for losses in (None, 3 - 3 * true)
    ]
    assert off[1] < off[0] / 3


@pytest.mark.parametrize(
    ("length", "of_five", "of_more"),
    [(0.5, 0.1011, 0.17), (1, 0.2022, 0.34), (2, 0.4043, 0.68), (3, 0.6065, 1), (20, 1, 1)],
)
def test_more_of_what_activations_lose_is_left_the_longer_the_probe_and_the_more_they_lose(length, of_five, of_more):
    attn, act = ratios(SPACE).T
    found = trained_alone(0.8 - 0.1 * attn - 0.2 * act - 0.1 * (attn - 0.5) * (act - 0.5), SPACE, length)
    lost = {n_act: found[0] - found[INDEX[Cell(0, n_act)]] for n_act in (2, 4, 8)}
    assert lost == pytest.approx({2: of_five * 0.05, 4: of_more * 0.1, 8: of_more * 0.2}, rel=1e-3)
    assert found[0] - found[INDEX[Cell(6, 0)]] == pytest.approx(0.085)


@given(st.floats(-0.2, 0.2), st.floats(0, 0.3), st.floats(0.1, 30))
def test_never_is_more_expected_to_be_left_of_activations_than_was_lost(by_attn, by_act, length):
    attn, act = ratios(SPACE).T
    found = trained_alone(0.8 - by_attn * attn - by_act * act, SPACE, length)
    lost = found[0] - found - 0.85 * by_attn * attn
    assert (lost >= -1e-12).all() and (lost <= by_act * act + 1e-12).all()


def test_a_probe_is_expected_by_what_is_left_and_a_run_as_it_is():
    cells = [Cell(0, 0), Cell(3, 2), Cell(2, 5), Cell(5, 5)]
    found = smooth(SPACE, cells, np.array([0.8, 0.7, 0.6, 0.4]), None, length=2)
    np.testing.assert_array_equal(found.expectation, trained_alone(found.mean, SPACE, 2))
    run = Hint(found.mean)
    np.testing.assert_array_equal(run.expectation, run.mean)
    assert found.spread < run.spread


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 7), st.integers(0, 7))
def test_a_surface_at_other_ratios_goes_through_the_same_values(a, g, b, h):
    own, other = RatioSpace(a, g), RatioSpace(b, h)
    plane = 0.8 - 0.3 * ratios(own)[:, 0] - 0.1 * ratios(own)[:, 1]
    # A kind without units is always at ratio 0.
    expected = 0.8 - 0.3 * ratios(other)[:, 0] * (a > 0) - 0.1 * ratios(other)[:, 1] * (g > 0)
    np.testing.assert_allclose(resampled(plane, own, other), expected, atol=1e-12)


def test_the_probe_comes_first_then_every_prior(tmp_path):
    store, prior = RunStore(str(tmp_path / "run")), RunStore(str(tmp_path / "prior"))
    assert hints_of(store, SPACE, RunConfig()) == []
    rows = surface(SPACE).reshape(7, 9).tolist()
    prior.write_json("recommendation.json", {"surface": {"n_attn": 6, "n_act": 8, "mean": rows}})
    cells = [Cell(0, 0), Cell(3, 2), Cell(2, 5), Cell(5, 5)]
    probed = [
        {
            "n_attn": c.n_attn,
            "n_act": c.n_act,
            "plan": "",
            "accuracy": 0.7 - c.total / 50,
            "loss": 1 + c.total / 20,
            "images": 9,
        }
        for c in cells
    ]
    write_probe(store, probed, {"cost": 1.0, "epochs": 2})
    config = RunConfig(prior=[prior.location, prior.location], trial=Recipe(epochs=4))
    found = hints_of(store, SPACE, config)
    assert len(found) == 3
    np.testing.assert_array_equal(found[0].expectation, trained_alone(found[0].mean, SPACE, length=0.5))
    assert found[0].mean[INDEX[Cell(0, 0)]] == pytest.approx(0.7, abs=0.02)
    np.testing.assert_allclose(found[1].mean, without_steps(surface(SPACE), SPACE))


@given(st.integers(0, 24), st.integers(0, 24), st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 0.8))
def test_a_prior_keeps_its_slopes_and_its_cliffs(n_attn, n_act, by_attn, by_act, cliff):
    space = RatioSpace(n_attn, n_act)
    attn, act = ratios(space).T
    beyond = np.array([(cell.n_attn == n_attn > 0) * cliff + (cell.n_act == n_act > 0) * cliff for cell in space])
    plane = 0.8 + by_attn * attn + by_act * act - beyond
    np.testing.assert_allclose(without_steps(plane, space), plane, atol=1e-9)


@given(st.integers(0, 11), st.booleans())
def test_what_a_single_unit_does_is_shared_with_those_beside_it(at, of_attn):
    space = RatioSpace(12, 12)
    step = np.array([float((cell.n_attn if of_attn else cell.n_act) == at) for cell in space])
    # Near the ends of the range the line through five cells is asked away from their middle.
    most = {0: 0.6, 1: 0.4, 10: 0.4, 11: 0.6}.get(at, 0.2)
    assert without_steps(step, space).max() == pytest.approx(most)


def test_a_small_lattice_stays_as_it_is():
    for space in (RatioSpace(0, 0), RatioSpace(2, 0), RatioSpace(2, 2)):
        values = np.random.default_rng(0).random(len(space))
        np.testing.assert_array_equal(without_steps(values, space), values)


def test_a_prior_that_has_not_searched_is_one_line(tmp_path):
    with pytest.raises(BadConfig, match=r"has no recommendation\.json: name the directory of a run"):
        prior_surface(str(tmp_path), SPACE)
