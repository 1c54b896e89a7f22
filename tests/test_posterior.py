"""The blend of polynomial, residual and noise."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpt_search.kernel import FittedKernel, Hyperparameters
from dpt_search.map_predictor import MapPredictor, monomials
from dpt_search.map_sampler import ratios
from dpt_search.posterior import Data, Hint, Surface
from search_spaces.ratios import RatioSpace

SPACE = RatioSpace(12, 12)
POINTS = ratios(SPACE)
SURFACE = Surface(POINTS)


def quadratic(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    falls = generator.uniform(0.02, 0.3, 5) * [1, 1, 1, 0.3, 1]
    return 0.85 - monomials(POINTS, 2)[:, 1:] @ falls


def observe(truth: np.ndarray, n: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    cells = generator.integers(0, len(truth), n)
    return cells, truth[cells] + noise * generator.standard_normal(n)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 40))
def test_order_of_arrival_does_not_matter(seed, n):
    cells, accuracies = observe(quadratic(seed), n, 0.003, seed)
    shuffled = np.random.default_rng(seed + 1).permutation(n)
    first = SURFACE.posterior(Data.of(cells, accuracies))
    second = SURFACE.posterior(Data.of(cells[shuffled], accuracies[shuffled]))
    np.testing.assert_array_equal(first.mean, second.mean)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), added=st.floats(-0.5, 0.5))
def test_adding_a_constant_moves_every_mean_by_it_and_no_uncertainty(seed, n, added):
    cells, accuracies = observe(quadratic(seed), n, 0.003, seed)
    hyper, _ = SURFACE.fit(Data.of(cells, accuracies))
    plain = SURFACE.posterior(Data.of(cells, accuracies), hyper)
    moved = SURFACE.posterior(Data.of(cells, accuracies + added), hyper)
    np.testing.assert_allclose(moved.mean, plain.mean + added, atol=1e-7)
    np.testing.assert_allclose(moved.covariance, plain.covariance, atol=1e-9)


@given(seed=st.integers(0, 10_000))
def test_without_residual_and_with_flat_priors_it_is_map(seed):
    cells, accuracies = observe(quadratic(seed), 30, 0.003, seed)
    limit = Hyperparameters(
        slope=100.0, noise=0.003, **dict.fromkeys(("step", "own", "single", "joint", "cliff_attn", "cliff_act"), 1e-9)
    )
    expected, error = MapPredictor(POINTS[cells], accuracies, degree=2).predict(POINTS)
    found = SURFACE.posterior(Data.of(cells, accuracies), limit)
    np.testing.assert_allclose(found.mean, expected, atol=1e-4)
    sd = MapPredictor(POINTS[cells], accuracies, degree=2).sd
    np.testing.assert_allclose(found.sd / limit.noise, error / sd, rtol=0.02)


@given(seed=st.integers(0, 10_000), n=st.integers(3, 60))
def test_means_stay_near_what_was_observed(seed, n):
    truth = quadratic(seed)
    cells, accuracies = observe(truth, n, 0.005, seed)
    mean = SURFACE.posterior(Data.of(cells, accuracies)).mean
    assert mean.max() < truth.max() + 0.05


@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), known=st.integers(-1, len(POINTS) - 1))
def test_marginal_likelihood_gradient(seed, n, known):
    data = Data.of(*observe(quadratic(seed), n, 0.004, seed))
    data = data.knowing(known, 0.8, 0.02) if known >= 0 else data
    hyper = Hyperparameters()
    surface = Surface(POINTS, 2, [Hint(quadratic(seed + 1), 1e-4 * np.eye(len(POINTS)))])
    kernel = FittedKernel(surface._kernel, data.cells)
    _, gradient = surface._negative_log_likelihood(data, kernel, hyper)
    for name in gradient:
        low, high = (
            surface._negative_log_likelihood(
                data, kernel, replace(hyper, **{name: getattr(hyper, name) * np.exp(step)})
            )[0]
            for step in (-1e-5, 1e-5)
        )
        assert gradient[name] == pytest.approx((high - low) / 2e-5, rel=1e-3, abs=1e-3)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 30))
def test_what_is_fitted_is_the_prior(seed, n):
    surface = Surface(POINTS, 2, [Hint(quadratic(seed), np.cov(np.random.default_rng(seed).normal(0, 0.01, (169, 9))))])
    cells = np.random.default_rng(seed).permutation(len(POINTS))[:n]
    for hyper in (Hyperparameters(), Hyperparameters(length=0.2, cliff_act=0.5, joint=0.3)):
        fitted, _ = FittedKernel(surface._kernel, cells).at(hyper)
        np.testing.assert_allclose(fitted, surface._kernel.between(hyper, cells, cells), rtol=1e-10, atol=1e-14)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 30))
def test_some_cells_are_believed_what_they_are_among_all(seed, n):
    data = Data.of(*observe(quadratic(seed), n, 0.004, seed))
    cells = np.random.default_rng(seed).permutation(len(POINTS))[:20]
    all_of_them, some = (SURFACE.posterior(data, Hyperparameters(), asked) for asked in (None, cells))
    np.testing.assert_allclose(some.mean, all_of_them.mean[cells], atol=1e-12)
    np.testing.assert_allclose(some.covariance, all_of_them.covariance[np.ix_(cells, cells)], atol=1e-12)


def test_every_hyperparameter_is_learnt():
    surface = Surface(POINTS, 2, [Hint(quadratic(7))])
    data = Data.of(np.array([3]), np.array([0.8]))
    _, gradient = surface._negative_log_likelihood(data, FittedKernel(surface._kernel, data.cells), Hyperparameters())
    assert set(gradient) == {f.name for f in fields(Hyperparameters)}


def test_repeated_trials_are_averaged():
    once = Data.of(np.array([5, 9]), np.array([0.8, 0.7]))
    often = Data.of(np.array([5, 9, 5, 5]), np.array([0.81, 0.7, 0.79, 0.80]))
    np.testing.assert_allclose(often.means, once.means)
    assert often.counts.tolist() == [3, 1]
    assert often.scatter == pytest.approx(2e-4)
    hyper = Hyperparameters()
    assert SURFACE.posterior(often, hyper).sd[5] < SURFACE.posterior(once, hyper).sd[5]


def test_pending_trials_shrink_uncertainty_and_move_nothing():
    data = Data.of(*observe(quadratic(1), 8, 0.003, 1))
    plain = SURFACE.posterior(data)
    pending = plain.with_pending(np.array([20, 20, 100]))
    np.testing.assert_array_equal(pending.mean, plain.mean)
    assert pending.sd[20] < plain.sd[20]
    assert (pending.sd <= plain.sd + 1e-12).all()


def test_pending_trials_count_as_observed_at_their_mean():
    data = Data.of(*observe(quadratic(2), 8, 0.003, 2))
    hyper, _ = SURFACE.fit(data)
    plain = SURFACE.posterior(data, hyper)
    cells = np.append(data.cells, [20, 100])
    means, counts = np.append(data.means, plain.mean[[20, 100]]), np.append(data.counts, [1, 1])
    told = Data(cells, means, counts, data.scatter, np.append(data.extra, [0, 0]))
    expected = SURFACE.posterior(told, hyper)
    found = plain.with_pending(np.array([20, 100]))
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-6)
    np.testing.assert_allclose(found.covariance, expected.covariance, atol=1e-6)


def test_learns_a_quadratic_from_a_dozen_trials():
    truth = quadratic(3)
    mean = SURFACE.posterior(Data.of(*observe(truth, 14, 0.001, 3))).mean
    inner = (POINTS < 1).all(axis=1)
    assert np.abs(mean - truth)[inner].mean() < 0.01


def test_the_last_unit_of_a_kind_is_a_cliff_until_a_trial_says_otherwise():
    cells = np.array([14, 19, 84, 122, 136])
    truth = 0.9 - 0.1 * POINTS.sum(axis=1)
    before = SURFACE.posterior(Data.of(cells, truth[cells])).mean
    edge = [12 * 13 + 4, 12 * 13 + 9]
    assert (before[edge] < truth[edge] - 0.2).all()
    seen = np.append(cells, edge[0])
    after = SURFACE.posterior(Data.of(seen, truth[seen])).mean
    assert abs(after[edge[1]] - truth[edge[1]]) < 0.03


def test_a_trial_tells_of_its_row_and_its_column():
    data = Data.of(np.array([30]), np.array([0.9]))
    sd = SURFACE.posterior(data, Hyperparameters(slope=1e-6)).sd.reshape(13, 13)
    assert sd[2, 9] < sd[9, 9]
    assert sd[8, 4] < sd[8, 11]


def test_what_is_known_of_a_cell_without_doubt_is_a_trial_of_it():
    cells, accuracies = observe(quadratic(2), 8, 0.003, 2)
    data, hyper = Data.of(cells, accuracies), Hyperparameters()
    free = next(cell for cell in range(len(quadratic(2))) if cell not in cells)
    tried = SURFACE.posterior(Data.of(np.append(cells, free), np.append(accuracies, 0.7)), hyper)
    known = SURFACE.posterior(data.knowing(free, 0.7, 0.0), hyper)
    np.testing.assert_allclose(known.mean, tried.mean, atol=1e-9)
    np.testing.assert_allclose(known.covariance, tried.covariance, atol=1e-9)
    doubted = SURFACE.posterior(data.knowing(free, 0.7, 1e3), hyper)
    np.testing.assert_allclose(doubted.mean, SURFACE.posterior(data, hyper).mean, atol=1e-4)
