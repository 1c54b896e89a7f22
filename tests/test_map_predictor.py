"""MAP against the published samples and against brute force."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpt_search.map_predictor import MapPredictor, NotIdentified, leave_2_out, monomials
from dpt_search.published import published as published_trials


@pytest.fixture(scope="module")
def published():
    """Retained ratios and accuracies (percent) of the 22 samples of DeiT-B on ImageNet-1k that HetDPT published."""
    cells, accuracies = published_trials()
    return 1 - np.array([[cell.n_attn, cell.n_act] for cell in cells]) / 12, 100 * accuracies


def test_the_fit_of_the_published_samples(published):
    predictor = MapPredictor(*published)
    assert predictor.degree == 2
    assert predictor.coefficients.round(2).tolist() == [14.49, 99.94, 29.49, -45.81, -14.04, -2.44]


def test_leave_2_out_of_the_published_samples_and_where_it_is_undetermined(published):
    errors = MapPredictor(*published).leave_2_out
    assert errors[1] == pytest.approx(2.008, abs=5e-4)
    assert errors[2] == pytest.approx(0.592, abs=5e-4)
    assert np.isnan(errors[3])
    assert np.isnan(errors[4])


@pytest.mark.parametrize(("total", "cell"), [(4, (2, 2)), (6, (2, 4)), (8, (2, 6)), (10, (2, 8))])
def test_decisions_on_the_published_samples(published, total, cell):
    line = [(n, total - n) for n in range(total + 1)]
    mean, _ = MapPredictor(*published).predict(1 - np.array(line) / 12)
    assert line[int(mean.argmax())] == cell


def test_leave_one_out_order_of_the_published_samples(published):
    from scipy.stats import kendalltau

    points, accuracies = published
    left_out = []
    for i in range(len(points)):
        others = np.arange(len(points)) != i
        left_out.append(MapPredictor(points[others], accuracies[others], degree=2).predict(points[[i]])[0][0])
    assert kendalltau(left_out, accuracies).statistic == pytest.approx(0.905, abs=5e-4)


@given(seed=st.integers(0, 10_000), degree=st.integers(1, 3))
def test_leave_2_out_is_what_refitting_gives(seed, degree):
    generator = np.random.default_rng(seed)
    points, accuracies = generator.random((16, 2)), generator.random(16)
    features = monomials(points, degree)
    squares = []
    for pair in combinations(range(16), 2):
        rest = np.setdiff1d(np.arange(16), pair)
        refit = np.linalg.lstsq(features[rest], accuracies[rest], rcond=None)[0]
        squares += list((accuracies[list(pair)] - features[list(pair)] @ refit) ** 2)
    assert leave_2_out(points, accuracies, degree) == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-6)


@given(seed=st.integers(0, 10_000))
def test_exact_on_noise_free_quadratics(seed):
    generator = np.random.default_rng(seed)
    coefficients = generator.normal(size=6)
    points, elsewhere = generator.random((12, 2)), generator.random((30, 2))
    predictor = MapPredictor(points, monomials(points, 2) @ coefficients, degree=2)
    mean, error = predictor.predict(elsewhere)
    np.testing.assert_allclose(mean, monomials(elsewhere, 2) @ coefficients, atol=1e-7)
    assert (error < 1e-6).all()


def test_standard_errors_cover_the_truth():
    generator = np.random.default_rng(0)
    points, elsewhere = generator.random((25, 2)), np.array([[0.5, 0.5]])
    truth, covered = 0.8, 0
    for _ in range(400):
        mean, error = MapPredictor(points, truth + 0.01 * generator.standard_normal(25), degree=2).predict(elsewhere)
        covered += abs(mean[0] - truth) < 1.96 * error[0]
    assert 0.90 <= covered / 400 <= 0.97


def test_refuses_samples_of_one_line():
    line = np.array([[n / 12, (8 - n) / 12] for n in range(9)])
    with pytest.raises(NotIdentified, match="9 samples do not determine the 6 coefficients"):
        MapPredictor(line, np.linspace(0.8, 0.7, 9), degree=2)
    with pytest.raises(NotIdentified, match="sample more cells"):
        MapPredictor(line, np.linspace(0.8, 0.7, 9))
