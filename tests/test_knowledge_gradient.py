"""The closed form against Monte Carlo and against its properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpt_search.knowledge_gradient import knowledge_gradient


def quadrature(mean: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    z = np.linspace(-9, 9, 60_001)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    best = (mean[None, :, None] + slopes[:, :, None] * z).max(axis=1)
    return (best * density).sum(axis=1) * (z[1] - z[0]) - mean.max()


@given(seed=st.integers(0, 10_000), alternatives=st.integers(1, 13), candidates=st.integers(1, 6))
def test_agrees_with_numerical_integration(seed, alternatives, candidates):
    generator = np.random.default_rng(seed)
    mean, slopes = generator.normal(size=alternatives), generator.normal(size=(candidates, alternatives))
    np.testing.assert_allclose(knowledge_gradient(mean, slopes), quadrature(mean, slopes), atol=1e-6)


@given(seed=st.integers(0, 10_000))
def test_ties_in_means_and_slopes(seed):
    generator = np.random.default_rng(seed)
    mean = generator.integers(0, 3, 8).astype(float)
    slopes = generator.integers(-2, 3, (5, 8)).astype(float)
    np.testing.assert_allclose(knowledge_gradient(mean, slopes), quadrature(mean, slopes), atol=1e-6)


def test_a_candidate_that_tells_nothing_is_worth_nothing():
    assert knowledge_gradient(np.array([0.1, 0.3, 0.2]), np.zeros((2, 3))).tolist() == [0.0, 0.0]


def test_one_that_moves_all_alternatives_alike_is_worth_nothing():
    assert knowledge_gradient(np.array([0.1, 0.3, 0.2]), np.ones((1, 3))).tolist() == [0.0]


def test_tiny_values_keep_their_order():
    slopes = np.array([[0.0, 0.010], [0.0, 0.011]])
    found = knowledge_gradient(np.array([0.1, 0.0]), slopes)
    assert 0 < found[0] < found[1] < 1e-15


def test_two_equal_alternatives():
    found = knowledge_gradient(np.zeros(2), np.array([[0.0, 1.0]]))
    assert found[0] == pytest.approx(1 / np.sqrt(2 * np.pi))


@pytest.mark.filterwarnings("error")
def test_slopes_that_hardly_differ():
    slopes = np.array([[1e-310, 0.0, 2e-310], [1.0, 1.0, 1.0 + 1e-16]])
    assert knowledge_gradient(np.array([0.0, 1.0, 0.5]), slopes).tolist() == [0.0, 0.0]


def test_a_long_envelope():
    intercepts, slopes = -(np.linspace(-2, 2, 25) ** 2) / 2, np.linspace(-2, 2, 25)[None]
    np.testing.assert_allclose(knowledge_gradient(intercepts, slopes), quadrature(intercepts, slopes), atol=1e-6)


def test_a_breakpoint_beyond_all_outcomes_is_worth_nothing():
    assert knowledge_gradient(np.array([0.1, 0.0]), np.array([[0.0, 0.0025], [0.0025, 0.0]])).tolist() == [0.0, 0.0]


@given(seed=st.integers(0, 10_000))
def test_candidates_of_different_beliefs_are_worth_what_each_is_alone(seed):
    generator = np.random.default_rng(seed)
    means, slopes = generator.normal(size=(4, 7)), generator.normal(size=(4, 7))
    alone = [knowledge_gradient(mean, slope[None])[0] for mean, slope in zip(means, slopes, strict=True)]
    np.testing.assert_allclose(knowledge_gradient(means, slopes), alone, atol=1e-12)
