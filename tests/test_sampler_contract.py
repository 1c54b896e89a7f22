"""Optuna's public contract for samplers, and what a sampler meets in other people's studies."""

import pickle
import warnings
from collections.abc import Callable

import numpy as np
import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase
from optuna.trial import Trial, TrialState

from dpt_search.config import SAMPLER_NAMES
from dpt_search.map_sampler import initial_design
from dpt_search.samplers import cell_of, make_sampler, search_space
from search_spaces.goals import unit_goals
from search_spaces.ratios import Cell, RatioSpace

SPACE = RatioSpace(6, 5)
BUDGETS = unit_goals(SPACE, 3, 4, 6)
DESIGN = initial_design(SPACE, BUDGETS)

optuna.logging.set_verbosity(optuna.logging.ERROR)


def new_sampler(name: str = "map") -> BaseSampler:
    return make_sampler(name, SPACE, BUDGETS, seed=0)


def new_study(sampler: BaseSampler | None = None) -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=sampler or new_sampler())


def suggest(trial: Trial) -> Cell:
    return Cell(trial.suggest_int("n_attn", 0, SPACE.n_attn), trial.suggest_int("n_act", 0, SPACE.n_act))


def accuracy(cell: Cell) -> float:
    return 0.9 - 0.01 * (cell.n_attn - 1) ** 2 - 0.004 * (cell.n_act - 3) ** 2


def objective(trial: Trial) -> float:
    return accuracy(suggest(trial))


def cells(study: optuna.Study) -> list[Cell]:
    return [Cell(t.params["n_attn"], t.params["n_act"]) for t in study.trials]


class TestOptunasContract(BasicSamplerTestCase):
    """Parameters that are not cells, ranges and conditions that change, values that are no numbers."""

    # Not `grid`: it has no floats, and Optuna leaves its own out too. `gp` takes longer than all of these together.
    @pytest.fixture(params=["map", "tpe", "cmaes", "qmc", "random"])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: new_sampler(request.param)


class TestOptunasContractOfOneObjective(SingleOnlySamplerTestCase):
    @pytest.fixture(params=["map", "cmaes"])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: new_sampler(request.param)


class TestOptunasContractOfRelativeSampling(RelativeSamplerTestCase):
    # These ask for any two parameters together; the cells' are the only ones that this sampler proposes together.
    test_sample_relative_numerical = test_sample_relative_categorical = test_sample_relative_mixed = None

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return new_sampler


@pytest.mark.parametrize("name", SAMPLER_NAMES)
class TestEverySampler:
    def test_several_threads(self, name):
        study = new_study(new_sampler(name))
        study.optimize(lambda trial: objective_of(name, trial), n_trials=9, n_jobs=3)
        assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 9
        assert len({tuple(t.params.values()) for t in study.trials}) > 4

    def test_reseeding_changes_nothing_for_its_randomness_is_the_trials(self, name):
        plain, reseeded = new_study(new_sampler(name)), new_study(new_sampler(name))
        for _ in range(6):
            reseeded.sampler.reseed_rng()
            for study in (plain, reseeded):
                study.optimize(lambda trial: objective_of(name, trial), n_trials=1)
        assert [t.params for t in reseeded.trials] == [t.params for t in plain.trials]

    def test_goes_through_pickle_as_tunes_snapshots_do(self, name):
        study = new_study(new_sampler(name))
        study.optimize(lambda trial: objective_of(name, trial), n_trials=5)
        again = new_study(pickle.loads(pickle.dumps(study.sampler)))
        again.add_trials(study.trials)
        space = search_space(name, SPACE, BUDGETS)
        assert cell_of(again.ask(space).params, BUDGETS) in SPACE


def objective_of(name: str, trial: Trial) -> float:
    """Ask for a sampler's own parameters, by define-by-run."""
    space = search_space(name, SPACE, BUDGETS)
    params = {key: trial.suggest_int(key, integers.low, integers.high) for key, integers in space.items()}
    return accuracy(cell_of(params, BUDGETS))


class TestOtherParameters:
    """MapSampler leaves them to chance."""

    def test_two_of_one_trial_are_drawn_apart(self):
        study = new_study()
        for _ in range(30):
            trial = study.ask()
            study.tell(trial, trial.suggest_float("lr", 0, 1) - trial.suggest_float("decay", 0, 1))
        drawn = np.array([(t.params["lr"], t.params["decay"]) for t in study.trials])
        assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.6

    def test_are_a_function_of_number_and_name(self):
        first, second = (
            [study.ask().suggest_float("lr", 0, 1) for _ in range(3)] for study in (new_study(), new_study())
        )
        assert first == second
        assert len(set(first)) == 3

    def test_a_count_that_is_fixed_stays_fixed(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = new_study(optuna.samplers.PartialFixedSampler({"n_attn": 2}, new_sampler()))
        study.optimize(objective, n_trials=7)
        assert {cell.n_attn for cell in cells(study)} == {2}
        assert len(set(cells(study))) > 2

    def test_an_enqueued_count_gets_the_other(self):
        study = new_study()
        study.enqueue_trial({"n_attn": 5})
        study.optimize(objective, n_trials=2)
        assert cells(study)[0].n_attn == 5
        assert all(cell in SPACE for cell in cells(study))


class TestUnusualStudies:
    @pytest.mark.parametrize(("low", "high"), [(-3, 3), (2, 4), (0, 40), (20, 30)])
    def test_ranges_that_are_not_the_spaces(self, low, high):
        study = new_study()
        study.optimize(objective, n_trials=3)
        study.optimize(lambda t: t.suggest_int("n_attn", low, high) - t.suggest_int("n_act", 0, 5) / 10, n_trials=8)
        assert all(low <= t.params["n_attn"] <= high for t in study.trials[3:])
        study.optimize(objective, n_trials=3)
        assert all(0 <= t.params["n_attn"] <= SPACE.n_attn for t in study.trials[-3:])

    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), None])
    def test_a_value_that_is_no_number_counts_as_a_failure(self, value):
        study = new_study()
        study.optimize(lambda t: value if t.number % 2 else objective(t), n_trials=2)
        study.optimize(lambda t: value if t.number % 2 and suggest(t) else objective(t), n_trials=10)
        tried = [Cell(t.params["n_attn"], t.params["n_act"]) for t in study.trials[2:]]
        lost = tried[1::2]
        assert len(set(lost)) == len(lost) == 5
        assert not set(lost) & set(tried[::2])

    @pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
    def test_values_of_any_scale(self, scale):
        study = new_study()
        study.optimize(lambda t: scale * objective(t), n_trials=9)
        assert len(set(cells(study))) > 4

    def test_pruned_trials_and_errors_that_are_caught(self):
        def breaks(trial: Trial) -> float:
            cell = suggest(trial)
            trial.report(0.1, step=1)
            if trial.number % 3 == 1:
                raise optuna.TrialPruned
            if trial.number % 3 == 2:
                raise RuntimeError("out of memory")
            return accuracy(cell)

        study = new_study()
        study.optimize(breaks, n_trials=12, catch=RuntimeError)
        tried = cells(study)
        assert [t.state for t in study.trials[:3]] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
        assert all(tried[n] not in tried[n + 1 :] for n in range(12) if n % 3)

    def test_only_some_trials_have_a_cell(self):
        study = new_study()
        study.optimize(lambda t: objective(t) if t.suggest_categorical("prune", [True, False]) else 0.9, n_trials=16)
        assert 2 < sum("n_attn" in t.params for t in study.trials) < 16

    def test_several_objectives_are_refused_with_the_reason(self):
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=new_sampler())
        with pytest.raises(ValueError, match="multi-objective"):
            study.optimize(lambda t: (objective(t), 1.0), n_trials=1)


class TestWorkers:
    @pytest.mark.parametrize("finished", [0, 6])
    def test_those_that_ask_at_once_get_different_cells(self, finished):
        study = new_study()
        study.optimize(objective, n_trials=finished)
        space = search_space("map", SPACE, BUDGETS)
        for _ in range(5):
            study.ask()
        # None of them has told the study its cell when the others decide.
        proposed = [study.sampler.sample_relative(study, trial, space) for trial in study.trials[-5:]]
        assert len({tuple(params.values()) for params in proposed}) == 5

    def test_the_order_of_asking_does_not_matter(self):
        one, other = new_study(), new_study()
        for study in (one, other):
            study.optimize(objective, n_trials=6)
        first = [suggest(trial) for trial in [one.ask() for _ in range(3)]]
        assert [suggest(trial) for trial in reversed([other.ask() for _ in range(3)])] == first[::-1]

    @pytest.mark.parametrize("lost", [DESIGN, list(SPACE), [None, None]], ids=["design", "every cell", "before a cell"])
    def test_goes_on_beside_trials_that_no_process_runs_any_more(self, lost):
        study = new_study()
        for cell in lost:
            params = {} if cell is None else {"n_attn": cell.n_attn, "n_act": cell.n_act}
            study.enqueue_trial(params)
            trial = study.ask()
            if cell is not None:
                suggest(trial)
        study.optimize(objective, n_trials=8)
        done = [t for t in study.trials if t.state is TrialState.COMPLETE]
        assert len(done) == 8
        assert len({tuple(t.params.values()) for t in done}) > 4

    def test_a_lost_trials_cell_is_left_alone_while_there_are_others(self):
        study = new_study()
        gone = suggest(study.ask())
        study.optimize(objective, n_trials=6)
        assert gone not in cells(study)[1:]
