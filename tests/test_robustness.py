"""The noise study: its counts and costs, the published samples, runs' and tables' trials."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpt_search.config import BadConfig
from dpt_search.map_predictor import Array
from dpt_search.published import PRESETS, published, published_samples
from dpt_search.recommend import beliefs
from dpt_search.robustness import POINT, Noise, Samples, study
from dpt_search.robustness_report import run_study
from dpt_search.store import BadRun
from dpt_search.surface_table import write_table
from search_spaces.goals import unit_goals
from search_spaces.ratios import RatioSpace

SPACE = RatioSpace(2, 2)
SMALL, LARGE = PRESETS["hetdpt"].noises
EIGHT = unit_goals(RatioSpace(12, 12), 8)


def scripted(surfaces: Sequence[Sequence[float]]) -> tuple[Samples, list[Array]]:
    """Return samples of a line of three cells with one surface after another believed in, and what was seen."""
    left, seen = iter(surfaces), []

    def believe(accuracies: Array) -> tuple[Array, float]:
        seen.append(accuracies)
        surface = np.zeros(len(SPACE))
        # (0,2), (1,1) and (2,0).
        surface[[2, 4, 6]] = next(left)
        return surface, 0.0

    return Samples("scripted", SPACE, unit_goals(SPACE, 2), np.array([0.5, 0.6]), believe), seen


def noisy_samples() -> Samples:
    """Return the trials of every cell of a bowl, decided by the posterior."""
    space = RatioSpace(4, 4)
    cells = list(space)
    accuracies = np.array([0.9 - 0.01 * ((c.n_attn - 1) ** 2 + (c.n_act - 2) ** 2) for c in cells])

    def believe(disturbed: Array) -> tuple[Array, float]:
        found = beliefs(space, cells, disturbed)
        return found.mean, found.noise

    return Samples("bowl", space, unit_goals(space, 3), accuracies, believe)


def write_surface(folder: str, accuracies: Iterator[float | None]) -> str:
    space, location = RatioSpace(3, 3), f"{folder}/table.parquet"
    rows = [
        {"n_attn": c.n_attn, "n_act": c.n_act, "plan": "", "seed": seed, "removed_accuracy": 0.1, "accuracies": [],
         "accuracy": next(accuracies), "cost": 1.0, "seconds": 1.0, "start": "dense"}
        for c in space for seed in range(2)
    ]  # fmt: skip
    write_table(location, space, rows, {})
    return location


def test_moves_and_costs_are_counted_draw_by_draw():
    samples, seen = scripted([(0.9, 0.8, 0.6), (9, 1, 1), (1, 9, 1), (1, 1, 9), (1, 1, 9)])
    (found,) = study(samples, samples.budgets, Noise(0.1), 4, seed=0)
    assert (found.cell.n_attn, found.cell.n_act) == (0, 2)
    assert found.moves.tolist() == [0, 1, 2, 2]
    assert found.costs == pytest.approx([0, 0.1, 0.3, 0.3])
    assert found.shares == (0.25, 0.25, 0.5)
    # Undisturbed at first, then disturbed otherwise each time.
    assert seen[0].tolist() == [0.5, 0.6]
    assert len({tuple(each) for each in seen}) == 5


@pytest.mark.parametrize("samples", [published_samples(), noisy_samples()], ids=lambda samples: samples.name)
def test_without_noise_every_decision_stays_and_costs_nothing(samples):
    for found in study(samples, samples.budgets, Noise(0.0), 3, seed=0):
        assert found.shares == (1.0, 0.0, 0.0)
        assert not found.costs.any()


@pytest.mark.parametrize("samples", [published_samples(), noisy_samples()], ids=lambda samples: samples.name)
def test_much_noise_moves_many_decisions_and_costs(samples):
    for found in study(samples, samples.budgets, Noise(0.5), 40, seed=0):
        assert found.shares[0] < 0.7
        assert found.shares[2] > 0.1
        assert found.costs.mean() > 0
        assert (found.costs >= 0).all()


@given(sd=st.floats(0, 0.2), seed=st.integers(0, 1000))
def test_shares_sum_to_one_and_a_decision_that_stays_is_free(sd, seed):
    samples = published_samples()
    for found in study(samples, samples.budgets, Noise(sd), 5, seed):
        assert sum(found.shares) == pytest.approx(1)
        assert np.array_equal(found.costs == 0, found.moves == 0)


def test_a_seed_fixes_the_study():
    samples = published_samples()
    first, again, other = (study(samples, EIGHT, LARGE, 30, seed)[0].costs.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_noise_has_its_spread_and_is_clipped():
    draws = LARGE.draw(np.random.default_rng(0), 20_000) / POINT
    assert np.abs(draws).max() == pytest.approx(0.5)
    assert draws.mean() == pytest.approx(0, abs=0.01)
    assert draws.std() == pytest.approx(0.284, abs=0.005)
    assert SMALL.draw(np.random.default_rng(0), 20_000).std() / POINT == pytest.approx(0.1, abs=0.003)


def test_the_published_samples_are_22_of_deit_b():
    cells, accuracies = published()
    assert len(set(cells)) == len(accuracies) == 22
    assert accuracies.max() == pytest.approx(0.818)


def test_the_published_study_does_not_reproduce():
    samples = published_samples()
    ((small,), (large,)) = (study(samples, EIGHT, noise, 1000, seed=0) for noise in (SMALL, LARGE))
    assert (small.cell.n_attn, small.cell.n_act) == (2, 6)
    assert small.shares[0] > 0.99
    assert 0.79 < large.shares[0] < 0.85
    # Published: 19.8 %.
    assert large.shares[2] < 0.01


def test_the_preset_puts_what_was_published_above_ours():
    lines = list(run_study("", preset="hetdpt", noise=None, budget="", draws=5, seed=0))
    table = lines[1].strip().splitlines()
    assert table[2].split() == ["as", "published", "75.0%", "5.2%", "19.8%"]
    assert len(table) == 3 + 2 * 4
    assert table[3].startswith("sd 0.1 points ")
    assert table[7].startswith("sd 0.316 points, clipped at 0.5 ")


def test_a_table_is_studied_with_the_noise_it_tells(tmp_path):
    generator = np.random.default_rng(0)
    location = write_surface(str(tmp_path), iter(0.8 + 0.005 * generator.standard_normal(32)))
    title, table, _ = run_study(location, preset="", noise=None, budget="units=3", draws=4, seed=0)
    assert title.startswith(f"{location}: 32 trials, 4 draws")
    (row,) = table.strip().splitlines()[2:]
    assert 0.3 < float(row.split()[1]) < 0.8
    assert row.split()[3] == "units=3"


def test_noise_is_given_in_points(tmp_path):
    location = write_surface(str(tmp_path), iter(np.linspace(0.9, 0.7, 32)))
    _, table, _ = run_study(location, preset="", noise=0.25, budget="units=2,4", draws=2, seed=0)
    assert [row[: len("sd 0.25 points ")] for row in table.strip().splitlines()[2:]] == ["sd 0.25 points "] * 2


def test_refuses_what_cannot_be_studied(tmp_path):
    location = write_surface(str(tmp_path), iter([None] * 32))
    with pytest.raises(BadRun, match="has finished"):
        list(run_study(location, preset="", noise=None, budget="", draws=4, seed=0))
    for changes, says in (
        ({"noise": float("nan")}, "--noise is nan points"),
        ({"noise": 1.0, "preset": "hetdpt"}, "noise of its own"),
        ({"seed": -1}, "--seed is -1"),
    ):
        with pytest.raises(BadConfig, match=says):
            list(run_study(location, **{"preset": "", "noise": None, "budget": "", "draws": 4, "seed": 0, **changes}))
