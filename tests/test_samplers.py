"""One contract for every sampler: a new one joins by a row in `samplers`."""

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from dpt_search.config import SAMPLER_NAMES
from dpt_search.map_sampler import DESIGNS, MapSampler, initial_design
from dpt_search.posterior import Hint
from dpt_search.samplers import PURE, candidate_cells, cell_of, make_sampler, params_of, search_space
from search_spaces.goals import Goal, unit_goals
from search_spaces.ratios import Cell, RatioSpace

SPACE = RatioSpace(6, 5)
ONE, SEVERAL = unit_goals(SPACE, 4), unit_goals(SPACE, 3, 4, 6)

optuna.logging.set_verbosity(optuna.logging.ERROR)


def accuracy(cell: Cell) -> float:
    return 0.9 - 0.01 * (cell.n_attn - 1) ** 2 - 0.004 * (cell.n_act - 3) ** 2


def rebuilt(done: list[tuple[Cell, float]], name: str, budgets: Sequence[Goal], seed: int = 0):
    """A study as a search makes it from its log."""
    study = optuna.create_study(direction="maximize", sampler=make_sampler(name, SPACE, budgets, seed=seed))
    space = search_space(name, SPACE, budgets)
    for cell, value in done:
        params = params_of(cell, name, SPACE, budgets)
        study.add_trial(optuna.trial.create_trial(value=value, params=params, distributions=space))
    return study


def ask(study: optuna.Study, name: str, budgets: Sequence[Goal]) -> tuple[optuna.Trial, Cell]:
    trial = study.ask(search_space(name, SPACE, budgets))
    return trial, cell_of(trial.params, budgets)


def sequence(name: str, budgets: Sequence[Goal], n: int, seed: int = 0) -> list[Cell]:
    study, cells = rebuilt([], name, budgets, seed), []
    for _ in range(n):
        trial, cell = ask(study, name, budgets)
        study.tell(trial, accuracy(cell))
        cells.append(cell)
    return cells


def test_the_table_of_names_is_complete():
    assert set(SAMPLER_NAMES) == {"map", *PURE}


@pytest.mark.parametrize("budgets", [ONE, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("name", SAMPLER_NAMES)
class TestEverySampler:
    def test_proposes_cells_of_the_space(self, name, budgets):
        assert all(cell in SPACE for cell in sequence(name, budgets, 9))

    def test_a_search_rebuilt_from_its_log_goes_on_as_it_would_have(self, name, budgets):
        if name == "cmaes":
            pytest.skip("Optuna pickles the state of CMA-ES into the study; a rebuilt search starts it anew")
        cells = sequence(name, budgets, 8)
        for done in (1, 4, 7):
            study = rebuilt([(c, accuracy(c)) for c in cells[:done]], name, budgets)
            assert ask(study, name, budgets)[1] == cells[done]

    def test_survives_failed_and_pruned_trials(self, name, budgets):
        study = rebuilt([], name, budgets)
        for state in (TrialState.FAIL, TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE):
            trial, cell = ask(study, name, budgets)
            study.tell(trial, accuracy(cell) if state is TrialState.COMPLETE else None, state=state)
        assert ask(study, name, budgets)[1] in SPACE

    def test_proposes_beside_running_trials(self, name, budgets):
        study = rebuilt([], name, budgets)
        assert all(ask(study, name, budgets)[1] in SPACE for _ in range(8))

    def test_cells_and_parameters_translate_both_ways(self, name, budgets):
        for cell in candidate_cells(budgets):
            params = params_of(cell, name, SPACE, budgets)
            assert params is not None
            assert cell_of(params, budgets) == cell

    def test_takes_enqueued_trials(self, name, budgets):
        study = rebuilt([], name, budgets)
        wanted = candidate_cells(budgets)[2]
        study.enqueue_trial(params_of(wanted, name, SPACE, budgets))
        trial, cell = ask(study, name, budgets)
        study.tell(trial, 0.5)
        assert cell == wanted
        trial, cell = ask(study, name, budgets)
        study.tell(trial, 0.5)
        assert cell in SPACE


@pytest.mark.parametrize("name", ["tpe", "qmc", "random", "grid", "gp"])
def test_pure_search_of_one_budget_stays_on_its_line(name):
    assert all(cell.total == 4 for cell in sequence(name, ONE, 6))


@pytest.mark.parametrize("name", ["tpe", "qmc", "random", "grid"])
def test_another_seed_is_another_search(name):
    assert sequence(name, SEVERAL, 8, seed=0) != sequence(name, SEVERAL, 8, seed=1)


def test_the_grid_visits_every_feasible_cell_once():
    cells = candidate_cells(SEVERAL)
    assert sorted(sequence("grid", SEVERAL, len(cells))) == cells


def test_a_cell_outside_the_line_has_no_parameters_in_a_pure_search():
    assert params_of(Cell(0, 0), "tpe", SPACE, ONE) is None
    assert params_of(Cell(0, 0), "grid", SPACE, SEVERAL) is None
    assert params_of(Cell(0, 0), "map", SPACE, ONE) == {"n_attn": 0, "n_act": 0}


class TestMapSampler:
    def test_begins_with_its_design(self):
        assert sequence("map", SEVERAL, 4) == initial_design(SPACE, SEVERAL)

    def test_one_trial_is_enough_to_begin_with_where_the_dense_model_is_known(self):
        sampler = MapSampler(SPACE, SEVERAL, dense=0.9)
        middle = initial_design(SPACE, SEVERAL)[0]
        assert list(SPACE)[sampler.next_cell([], [])] == middle
        under_way = [list(SPACE).index(middle)]
        for _ in range(8):
            under_way.append(sampler.next_cell([], under_way))
        assert len(set(under_way)) == 9, "with more workers than that the next ones are chosen, each another"
        assert {list(SPACE)[cell] for cell in under_way} <= {cell for goal in SEVERAL for cell in goal.cells}

    @pytest.mark.parametrize("dense", [None, 0.9])
    def test_where_every_cell_failed_one_of_them_is_tried_again(self, dense):
        goals, cells = unit_goals(SPACE, 2), list(SPACE)
        failed = [cells.index(cell) for cell in goals[0].cells]
        assert MapSampler(SPACE, goals, dense=dense).next_cell([], [], failed) in failed

    @pytest.mark.parametrize("design", DESIGNS)
    def test_every_design_comes_first_and_lies_in_the_space(self, design):
        sampler = make_sampler("map", SPACE, SEVERAL, seed=0, design=design)
        study, wanted = optuna.create_study(direction="maximize", sampler=sampler), DESIGNS[design](SPACE, SEVERAL)
        assert set(wanted) <= set(SPACE)
        for cell in wanted:
            trial, found = ask(study, "map", SEVERAL)
            assert found == cell
            study.tell(trial, accuracy(cell))

    def test_finds_the_best_cells_of_all_budgets_in_a_dozen_trials(self):
        from dpt_search.recommend import Observation, recommend
        from search_spaces.plan import Ranking

        ranking = Ranking(tuple(range(6)), tuple(range(5)))
        cells = sequence("map", SEVERAL, 12)
        observations = [Observation(ranking.plan(c), "dense", accuracy(c), 1.0) for c in cells]
        for found in recommend(SPACE, SEVERAL, observations)[1]:
            best = max(accuracy(c) for c in found.budget.cells)
            assert accuracy(found.cell) > best - 0.003

    def test_adding_a_constant_changes_no_proposal(self):
        cells = sequence("map", SEVERAL, 9)
        for added in (-0.3, 0.05):
            study = rebuilt([(c, accuracy(c) + added) for c in cells[:8]], "map", SEVERAL)
            assert ask(study, "map", SEVERAL)[1] == cells[8]

    def test_minimising_a_loss_is_maximising_its_negative(self):
        cells = sequence("map", SEVERAL, 7)
        study = optuna.create_study(direction="minimize", sampler=MapSampler(SPACE, SEVERAL))
        for cell in cells:
            trial, found = ask(study, "map", SEVERAL)
            assert found == cell
            study.tell(trial, -accuracy(cell))

    def test_works_define_by_run(self):
        def objective(trial: optuna.Trial) -> float:
            cell = Cell(trial.suggest_int("n_attn", 0, 6), trial.suggest_int("n_act", 0, 5))
            trial.suggest_float("lr", 1e-4, 1e-2, log=True)
            return accuracy(cell)

        study = optuna.create_study(direction="maximize", sampler=MapSampler(SPACE, ONE))
        study.optimize(objective, n_trials=8)
        assert len(study.trials) == 8

    def test_a_cell_that_failed_is_not_tried_again(self):
        study = rebuilt([], "map", SEVERAL)
        failed = []
        for number in range(10):
            trial, cell = ask(study, "map", SEVERAL)
            assert cell not in failed
            if number % 2:
                failed.append(cell)
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, accuracy(cell))

    def test_dear_cells_are_tried_less(self):
        done = [(c, accuracy(c)) for c in initial_design(SPACE, SEVERAL)]
        index = {cell: i for i, cell in enumerate(SPACE)}
        told = [(index[c], value) for c, value in done]
        plain = MapSampler(SPACE, SEVERAL).next_cell(told, [])
        dear = MapSampler(SPACE, SEVERAL, lambda cell: 1e6 if index[cell] == plain else 1.0).next_cell(told, [])
        assert dear != plain

    def test_needs_neither_torch_nor_ray(self):
        code = (
            "import sys; sys.modules['torch'] = sys.modules['ray'] = None\n"
            "import optuna; from dpt_search.map_sampler import MapSampler; from search_spaces.goals import unit_goals\n"
            "from search_spaces.ratios import RatioSpace\nspace = RatioSpace(4, 4)\n"
            "study = optuna.create_study(direction='maximize', sampler=MapSampler(space, unit_goals(space, 3)))\n"
            "study.optimize(lambda t: t.suggest_int('n_attn', 0, 4) - t.suggest_int('n_act', 0, 4), n_trials=6)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_hints_that_change_are_taken_again():
    hints = [Hint(np.zeros(len(SPACE)))]
    sampler = MapSampler(SPACE, SEVERAL, hints=lambda: hints)
    done = [(i, accuracy(cell)) for i, cell in enumerate(SPACE) if i % 9 == 4]
    sampler.next_cell(done, [])
    before = sampler._blend
    sampler.next_cell(done, [])
    assert sampler._blend is before
    hints[0] = Hint(np.array([accuracy(cell) for cell in SPACE]))
    sampler.next_cell(done, [])
    assert sampler._blend is not before


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("space", [RatioSpace(0, 6), RatioSpace(6, 0)])
def test_a_kind_without_units_is_no_obstacle(design, space):
    sampler, done = MapSampler(space, unit_goals(space, 2, 4), design=design), []
    for _ in range(12):
        cell = sampler.next_cell(done, [])
        done.append((cell, 0.9 - 0.01 * cell))
    assert len({cell for cell, _ in done}) > 1
