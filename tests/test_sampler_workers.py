"""MapSampler with several processes on one storage, and in Ray's own search."""

import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable
from datetime import datetime

import optuna
import pytest
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from dpt_search.map_sampler import MapSampler, initial_design
from dpt_search.samplers import search_space
from search_spaces.goals import unit_goals
from search_spaces.ratios import Cell, RatioSpace

SPACE = RatioSpace(6, 5)
BUDGETS = unit_goals(SPACE, 3, 4, 6)
DESIGN = initial_design(SPACE, BUDGETS)

optuna.logging.set_verbosity(optuna.logging.ERROR)


def accuracy(cell: Cell) -> float:
    return 0.9 - 0.01 * (cell.n_attn - 1) ** 2 - 0.004 * (cell.n_act - 3) ** 2


def at_once(trials: list[FrozenTrial]) -> list[tuple[int, int]]:
    """Return the pairs of trials that ran the same cell at the same time."""
    return [
        (a.number, b.number)
        for a, b in itertools.combinations(trials, 2)
        if a.params == b.params and a.datetime_start < b.datetime_complete and b.datetime_start < a.datetime_complete
    ]


STORAGES: dict[str, Callable[[str], BaseStorage]] = {
    "rdb": lambda path: RDBStorage(f"sqlite:///{path}"),
    "journal": lambda path: JournalStorage(JournalFileBackend(path)),
}


def work(kind: str, path: str, trials: int) -> None:
    """Run trials in a process that has neither torch nor Ray."""
    sys.modules["torch"] = sys.modules["ray"] = None
    study = optuna.load_study(study_name="shared", storage=STORAGES[kind](path), sampler=MapSampler(SPACE, BUDGETS))

    def slow(trial: Trial) -> float:
        cell = Cell(trial.suggest_int("n_attn", 0, 6), trial.suggest_int("n_act", 0, 5))
        # Trials take longer than proposals, as real ones do, however slow this machine is just now.
        time.sleep(max(0.1, 4 * (datetime.now() - trial.datetime_start).total_seconds()))
        return accuracy(cell)

    study.optimize(slow, n_trials=trials)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", STORAGES)
def test_processes_share_a_study_without_torch_and_ray(kind, tmp_path):
    path = str(tmp_path / "study")
    study = optuna.create_study(study_name="shared", storage=STORAGES[kind](path), direction="maximize")
    workers = [multiprocessing.get_context("spawn").Process(target=work, args=(kind, path, 5)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 15
    assert set(DESIGN) <= {Cell(t.params["n_attn"], t.params["n_act"]) for t in study.trials}
    # Two workers that read while a third one writes may still agree.
    assert len(at_once(study.trials)) <= 2


@pytest.fixture
def ray_of_two_cores(monkeypatch):
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.mark.timeout(240)
def test_searches_in_rays_own_optuna_search(ray_of_two_cores, tmp_path):
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    def trainable(config: dict[str, int]) -> None:
        if (config["n_attn"], config["n_act"]) == (0, 0):
            raise RuntimeError("the dense model fails")
        tune.report({"accuracy": 0.9 - 0.01 * (config["n_attn"] - 1) ** 2 - 0.004 * (config["n_act"] - 3) ** 2})

    search = OptunaSearch(
        search_space("map", SPACE, BUDGETS), metric="accuracy", mode="max", sampler=MapSampler(SPACE, BUDGETS)
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(search_alg=search, num_samples=8, max_concurrent_trials=2, reuse_actors=True),
        run_config=tune.RunConfig(name="contract", storage_path=str(tmp_path), verbose=0),
    )
    found = tuner.fit()
    tried = [Cell(result.config["n_attn"], result.config["n_act"]) for result in found]
    assert len(tried) == 8
    assert set(DESIGN) <= set(tried)
    assert tried.count(Cell(0, 0)) == found.num_errors == 1
    best = found.get_best_result("accuracy", "max").config
    assert accuracy(Cell(best["n_attn"], best["n_act"])) > 0.88
