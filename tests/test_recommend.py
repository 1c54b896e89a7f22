"""Decisions from observations."""

import numpy as np
import pytest

from dpt_search.recommend import Observation, recommend
from search_spaces.goals import unit_goals
from search_spaces.plan import Ranking
from search_spaces.ratios import Cell, RatioSpace

SPACE = RatioSpace(6, 6)
RANKING = Ranking(tuple(range(6)), tuple(range(6)))


def observed(*rows: tuple[int, int, float]) -> list[Observation]:
    return [Observation(RANKING.plan(Cell(a, g)), "dense", accuracy, 1.0) for a, g, accuracy in rows]


def full_surface(noise: float = 0.0) -> list[Observation]:
    generator = np.random.default_rng(0)
    rows = [(c.n_attn, c.n_act, 0.9 - 0.004 * ((c.n_attn - 2) ** 2 + (c.n_act - 3) ** 2)) for c in SPACE]
    return observed(*((a, g, value + noise * generator.standard_normal()) for a, g, value in rows))


@pytest.mark.parametrize(("units", "cell"), [(3, Cell(1, 2)), (5, Cell(2, 3)), (7, Cell(3, 4))])
def test_many_trials_decide(units, cell):
    _, (found,) = recommend(SPACE, unit_goals(SPACE, units), full_surface())
    assert found.cell == cell
    assert found.probability_best > 0.5
    assert found.low < found.mean < found.high


def test_status_counts_the_cells_own_trials():
    surface = [o for o in full_surface() if o.plan.cell != Cell(2, 3)]
    mine = observed((2, 3, 0.9))
    for trials, status in ((0, "predicted"), (1, "observed"), (2, "confirmed"), (3, "confirmed")):
        _, (found,) = recommend(SPACE, unit_goals(SPACE, 5), surface + mine * trials)
        assert (found.cell, found.status) == (Cell(2, 3), status)


def test_one_observation_is_enough_to_answer():
    surface, found = recommend(SPACE, unit_goals(SPACE, 4, 12), observed((2, 2, 0.8)))
    assert [str(r.budget) for r in found] == ["units=4", "units=12"]
    assert np.array(surface["mean"]).shape == (7, 7)
    assert found[1].cell == Cell(6, 6)
    assert found[1].probability_best == 1.0


def test_the_dense_models_accuracy_tells_of_the_cell_without_removals():
    budgets = unit_goals(SPACE, 4)
    plain, _ = recommend(SPACE, budgets, observed((3, 3, 0.6)))
    told, _ = recommend(SPACE, budgets, observed((3, 3, 0.6)), dense=0.9)
    assert abs(told["mean"][0][0] - 0.9) < 0.03 < 0.1 < abs(plain["mean"][0][0] - 0.9)
    assert told["sd"][0][0] < 0.03 < plain["sd"][0][0]


def test_the_surface_is_laid_out_by_attention_then_activation():
    surface, _ = recommend(SPACE, unit_goals(SPACE, 4), observed((0, 0, 0.9), (6, 0, 0.3), (0, 6, 0.8), (3, 3, 0.7)))
    assert surface["mean"][6][0] < 0.5 < surface["mean"][0][6]


def test_refuses_no_observation():
    with pytest.raises(ValueError, match="nothing was observed"):
        recommend(SPACE, unit_goals(SPACE, 4), [])
