"""Averaged models: what no choice of model may break, and what a hint is worth, right or wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt_search.blend import FENCE, Blend
from dpt_search.hints import PROBE_TRUST
from dpt_search.map_predictor import monomials
from dpt_search.map_sampler import MapSampler, ratios
from dpt_search.posterior import Data, Hint, Surface
from dpt_search.surface_table import read_table
from search_spaces.goals import unit_goals
from search_spaces.ratios import RatioSpace

SPACE = RatioSpace(12, 12)
POINTS = ratios(SPACE)
LINES = [np.array([i for i, cell in enumerate(SPACE) if cell.total == total]) for total in range(4, 21, 4)]
FOLDER = Path(__file__).parents[1] / "benchmarks" / "tables"
TABLES = sorted(path for path in FOLDER.glob("*.parquet") if ".probes" not in path.stem)


def quadratic(seed: int) -> np.ndarray:
    falls = np.random.default_rng(seed).uniform(0.02, 0.3, 5) * [1, 1, 1, 0.3, 1]
    return 0.85 - monomials(POINTS, 2)[:, 1:] @ falls


def observe(truth: np.ndarray, n: int, noise: float, seed: int) -> Data:
    generator = np.random.default_rng([seed, 1])
    cells = generator.integers(0, len(truth), n)
    return Data.of(cells, truth[cells] + noise * generator.standard_normal(n))


def decision(mean: np.ndarray) -> list[int]:
    return [int(line[mean[line].argmax()]) for line in LINES]


def regret(truth: np.ndarray, mean: np.ndarray) -> float:
    return float(np.mean([truth[line].max() - truth[line[mean[line].argmax()]] for line in LINES]))


@pytest.mark.parametrize("dense", [None, 0.9])
@pytest.mark.parametrize("hinted", [False, True])
@given(seed=st.integers(0, 10_000), n=st.integers(3, 30), added=st.floats(-0.5, 0.5))
@settings(max_examples=12)
def test_the_decision_does_not_change_with_a_constant(dense, hinted, seed, n, added):
    hints = [Hint(quadratic(seed + 1))] if hinted else ()
    data = observe(quadratic(seed), n, 0.003, seed)
    plain = Blend(POINTS, hints=hints, dense=dense).posterior(data).mean
    told = Blend(POINTS, hints=hints, dense=None if dense is None else dense + added)
    moved = told.posterior(replace(data, means=data.means + added)).mean - added
    np.testing.assert_allclose(moved, plain, atol=2e-4)
    for line, cell in zip(LINES, decision(moved), strict=True):
        assert plain[line].max() - plain[cell] < 4e-4


def test_a_trial_without_removals_says_itself_what_the_dense_model_lets_expect():
    truth = quadratic(1)
    cells = np.array([0, 80, 120])
    data = Data.of(cells, truth[cells])
    told, plain = Blend(POINTS, dense=truth[0] + 0.3).posterior(data), Blend(POINTS).posterior(data)
    np.testing.assert_array_equal(told.mean, plain.mean)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 30))
@settings(max_examples=12)
def test_the_decision_does_not_change_with_the_order_of_arrival(seed, n):
    generator = np.random.default_rng(seed)
    cells, accuracies = generator.integers(0, len(POINTS), n), generator.uniform(0.5, 0.9, n)
    turned = generator.permutation(n)
    one = Blend(POINTS).posterior(Data.of(cells, accuracies)).mean
    np.testing.assert_array_equal(Blend(POINTS).posterior(Data.of(cells[turned], accuracies[turned])).mean, one)


@pytest.mark.timeout(180)
def test_means_stay_near_the_observed_ones_on_noisy_quadratics():
    blend = Blend(POINTS)
    for seed in range(500):
        data = observe(quadratic(seed), 3 + seed % 23, 0.004, seed)
        mean = blend.posterior(data).mean
        assert data.means.min() - FENCE <= mean.min()
        assert mean.max() <= data.means.max() + FENCE


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_means_stay_near_the_observed_ones_on_shipped_tables(path):
    table = read_table(str(path))
    position = {cell: i for i, cell in enumerate(table.space)}
    blend = Blend(ratios(table.space))
    for seed in range(12):
        generator = np.random.default_rng(seed)
        rows = generator.integers(0, len(table.cells), 3 + seed)
        data = Data.of(np.array([position[table.cells[row]] for row in rows]), table.accuracies[rows, 0])
        mean = blend.posterior(data).mean
        assert data.means.min() - FENCE <= mean.min() <= mean.max() <= data.means.max() + FENCE


@pytest.mark.parametrize("seed", range(4))
def test_the_search_is_exact_on_a_quadratic_without_noise(seed):
    space, truth = RatioSpace(6, 6), 0.9 - 0.2 * ((ratios(RatioSpace(6, 6)) - [0.1 * seed, 0.5]) ** 2).sum(axis=1)
    budgets = unit_goals(space, 4, 6, 8)
    sampler, done = MapSampler(space, budgets), []
    for _ in range(22):
        cell = sampler.next_cell(done, [])
        done.append((cell, float(truth[cell])))
    cells, accuracies = map(np.array, zip(*done, strict=True))
    mean = Blend(ratios(space)).posterior(Data.of(cells, accuracies)).mean
    index = {cell: i for i, cell in enumerate(space)}
    for budget in budgets:
        line = np.array([index[cell] for cell in budget.cells])
        assert truth[line[mean[line].argmax()]] == pytest.approx(truth[line].max())


def test_a_good_hint_decides_at_once_and_a_wrong_one_costs_little():
    hinted, unhinted, wrong, plain = [], [], [], []
    for seed in range(8):
        truth = quadratic(seed)
        upside_down = truth.reshape(13, 13).T.ravel()[::-1]
        few, many = observe(truth, 2, 0.003, seed), observe(truth, 20, 0.003, seed)
        hint = truth + 0.002 * np.random.default_rng(seed).standard_normal(len(truth))
        hinted.append(
            regret(truth, Blend(POINTS, hints=[Hint(hint, trust=PROBE_TRUST, spread=1.0)]).posterior(few).mean)
        )
        unhinted.append(regret(truth, Blend(POINTS).posterior(few).mean))
        wrong.append(regret(truth, Blend(POINTS, hints=[Hint(upside_down)]).posterior(many).mean))
        plain.append(regret(truth, Blend(POINTS).posterior(many).mean))
    assert np.mean(hinted) < 0.3 * np.mean(unhinted)
    assert np.mean(wrong) < np.mean(plain) + 0.002


@pytest.mark.parametrize("seed", range(4))
def test_a_hint_counts_as_much_as_it_is_trusted(seed):
    truth = quadratic(seed)
    seen, misleading = observe(truth, 3, 0.003, seed), truth.reshape(13, 13)[::-1, ::-1].ravel()
    plain = Blend(POINTS).posterior(seen).mean
    moved = [
        np.abs(Blend(POINTS, hints=[Hint(misleading, trust=trust)]).posterior(seen).mean - plain).mean()
        for trust in (Hint(misleading).trust, PROBE_TRUST)
    ]
    assert moved[0] < 0.2 * moved[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_wrong_earlier_run_takes_little_from_a_good_probe(seed):
    truth = quadratic(seed)
    seen, misleading = observe(truth, 3, 0.003, seed), truth.reshape(13, 13)[::-1, ::-1].ravel()
    probe = Hint(truth, trust=PROBE_TRUST, spread=1.0)
    alone, both = (Blend(POINTS, hints=hints).posterior(seen).mean for hints in ([probe], [probe, Hint(misleading)]))
    assert np.abs(both - truth).mean() < np.abs(alone - truth).mean() + 0.001


@given(seed=st.integers(0, 10_000), n=st.integers(2, 12))
@settings(max_examples=12)
def test_a_hint_gives_way_where_it_is_not_sure(seed, n):
    truth = quadratic(seed)
    # Wrong about the deeper half, and unsure there only.
    unsure = POINTS.sum(axis=1) > 1.0
    wrong = np.where(unsure, truth + 0.03 * np.sin(9 * POINTS[:, 0]), truth)
    covariance = np.outer(unsure, unsure) * 0.03**2 * np.exp(-18 * np.subtract.outer(POINTS[:, 0], POINTS[:, 0]) ** 2)
    generator = np.random.default_rng(seed)
    cells = generator.choice(np.flatnonzero(unsure), n)
    data = Data.of(cells, truth[cells])
    told, silent = Surface(POINTS, 2, [Hint(wrong, covariance)]), Surface(POINTS, 2, [Hint(wrong)])
    hyper = replace(told.fit(data)[0], noise=0.004)
    knowing, trusting = told.posterior(data, hyper), silent.posterior(data, hyper)
    assert np.abs(knowing.mean - truth)[cells].max() <= np.abs(trusting.mean - truth)[cells].max() + 1e-3
    assert (knowing.sd[unsure] >= trusting.sd[unsure] - 1e-6).all()


def test_a_single_trial_does_not_blur_what_a_hint_knows():
    lost = []
    for seed in range(8):
        hint = quadratic(seed)
        seen = observe(quadratic(seed + 100), 1, 0.003, seed)
        lost.append(regret(hint, Blend(POINTS, hints=[Hint(hint, trust=PROBE_TRUST, spread=1.0)]).posterior(seen).mean))
    assert np.mean(lost) < 0.0025


@pytest.mark.parametrize("seed", range(4))
def test_no_trial_is_spent_on_a_cell_that_every_model_knows_to_be_hopeless(seed):
    table = read_table(str(FOLDER / "fashion_mnist.parquet"))
    truth, cells, budgets = np.nanmean(table.accuracies, axis=1), list(SPACE), unit_goals(SPACE, *range(4, 21, 2))
    assert cells == table.cells
    best = [max(truth[i] for i, cell in enumerate(cells) if cell.total == total) for total in range(25)]
    hint = Hint(truth + 0.005 * np.random.default_rng(seed).standard_normal(len(truth)), trust=PROBE_TRUST, spread=1.0)
    sampler, done = MapSampler(SPACE, budgets, hints=lambda: [hint]), []
    for _ in range(6):
        index = sampler.next_cell(done, [])
        done.append((index, float(table.accuracies[index, seed % 3])))
        # Without any attention the accuracy is 10 %.
        assert truth[index] > best[cells[index].total] - 0.15
