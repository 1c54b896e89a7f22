"""How much of two workers' time is spent in trials?

    OMP_NUM_THREADS=1 python benchmarks/utilisation.py [--trials 20] [--subset 6000] [--epochs 2]

The search of a run on the embedded example, as `dpt-search search` does it, with two workers of one thread each and no
probe. Busy is the time inside `PruningTrial.step`, which trains and evaluates an epoch; its share is of both workers'
time from the first step of the first trial to the last step of the last one. What is between the last step of a trial
and the first one of the next trial of the same process is Tune's and the searcher's. With the defaults a trial takes
about half a minute on a core, so the whole takes six minutes on two cores that do nothing else.

Then for more workers than there are cores (--simulated 2,8,16,64): trials take time on a clock of their own, 30 seconds
for the dense model and less by their cost for others; every suggestion is the searcher's real one, on a table of real
trials, and takes on that clock what it took. They are made one after the other, as in a driver, so some workers wait.
"""

import argparse
import heapq
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna

from dpt_search import tune_search
from dpt_search.compare import Judge
from dpt_search.compare_report import budgets_of
from dpt_search.options import EMBEDDED, read_config
from dpt_search.problem import Problem
from dpt_search.run import open_run
from dpt_search.stages import STAGES
from dpt_search.strategies import STRATEGIES
from dpt_search.surface_table import read_table
from search_spaces.ratios import Cell
from trainables.locations import resolve
from trainables.pruning_trial import PruningTrial

OUT = Path(__file__).parent / "results" / "utilisation.json"
TABLE = Path(__file__).parent / "tables" / "fashion_mnist.parquet"
WORKERS = 2
TRIAL_SECONDS = 30.0
"""Of a simulated trial of the dense model."""
GOALS = {"utilisation": 0.95, "between_seconds": 0.3}
PACKAGES = ("ray", "torch", "optuna")


@dataclass(frozen=True)
class Step:
    """One call of a trial's step: which process, which trial, from when to when (seconds since the epoch)."""

    process: int
    trial: int
    start: float
    end: float


class TimedTrial(PruningTrial):
    """The Trainable, with a line for each of its steps in a file of its process."""

    folder = ""

    def step(self) -> dict[str, Any]:
        start = time.time()
        result = super().step()
        line = json.dumps([os.getpid(), self._config["trial"], start, time.time()])
        with open(f"{self.folder}/{os.getpid()}.txt", "a") as stream:
            stream.write(f"{line}\n")
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--subset", type=int, default=6000, help="training images of a trial")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--simulated", default="2,8,16,64", help="numbers of workers")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    many = [simulated(int(workers)) for workers in args.simulated.split(",")]
    with tempfile.TemporaryDirectory(prefix="utilisation_") as folder:
        steps = run_search(folder, args.trials, args.subset, args.epochs)
    found = summary(steps)
    about = {"cpu": cpu_name(), "cores": os.cpu_count(), **{name: version(name) for name in PACKAGES}}
    asked = {"workers": WORKERS, "trials": args.trials, "subset": args.subset, "epochs": args.epochs}
    told = {"about": about, **asked, **found, "simulated": many, "goals": GOALS}
    args.out.write_text(json.dumps(told, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name}: {value}")
    for each in many:
        print(", ".join(f"{name} {value}" for name, value in each.items()))


def run_search(folder: str, trials: int, subset: int, epochs: int) -> list[Step]:
    """Run the stages up to the search, and return all its steps."""
    told = [
        f"--config={resolve(EMBEDDED)[1]}", f"--run-dir={folder}/run", "--probe-epochs=0",
        f"--max-trials={trials}", f"--max-concurrent={WORKERS}",
        f"--data.subset={subset}", f"--trial-epochs={epochs}", "--timing-seconds=2",
    ]  # fmt: skip
    TimedTrial.folder = folder
    tune_search.PruningTrial = TimedTrial
    with open_run(read_config("run", told), print) as run:
        for stage in ("dense", "profile", "rank", "search"):
            STAGES[stage](run)
    lines = [line for path in Path(folder).glob("*.txt") for line in path.read_text().splitlines()]
    return sorted((Step(*json.loads(line)) for line in lines), key=lambda step: step.start)


def summary(steps: list[Step]) -> dict[str, Any]:
    """Return the share of the workers' time inside steps, and the time between trials.

    Args:
        steps: of all trials, by start.
    """
    by_process = defaultdict(list)
    for step in steps:
        by_process[step.process].append(step)
    between, within = [], []
    for own in by_process.values():
        for one, next_one in pairwise(own):
            (within if one.trial == next_one.trial else between).append(next_one.start - one.end)
    seconds = defaultdict(float)
    for step in steps:
        seconds[step.trial] += step.end - step.start
    start, end = min(step.start for step in steps), max(step.end for step in steps)
    return {
        "utilisation": round(sum(seconds.values()) / (WORKERS * (end - start)), 4),
        "window_seconds": round(end - start, 2),
        "trial_seconds_median": round(statistics.median(seconds.values()), 2),
        "processes": len(by_process),
        "between_trials_seconds_median": round(statistics.median(between), 3),
        "between_trials_seconds_max": round(max(between), 3),
        "between_epochs_seconds_median": round(statistics.median(within), 3) if within else None,
        # At the end the workers do not stop together, which is no overhead.
        "last_worker_alone_seconds": round(end - min(own[-1].end for own in by_process.values()), 2),
    }


def simulated(workers: int) -> dict[str, Any]:
    """Return the share of simulated workers' time inside trials, ten for each of them, until the last one starts."""
    table = read_table(str(TABLE))
    budgets = budgets_of("", table.space)
    judge = Judge(table, budgets, seed=0)
    strategy = STRATEGIES["map/no-probe"](Problem(table.space, budgets, judge.cost, seed=0, dense=table.dense))
    free = [0.0] * workers
    running: list[tuple[float, int, Cell]] = []
    driver, asking, spans = 0.0, list[float](), list[tuple[float, float]]()
    for _ in range(10 * workers):
        ready = heapq.heappop(free)
        while running and running[0][0] <= max(driver, ready):
            _, token, cell = heapq.heappop(running)
            strategy.tell(token, judge.observe(cell))
        begun = time.perf_counter()
        asked = strategy.ask()
        asking.append(time.perf_counter() - begun)
        if asked is None:
            raise SystemExit(f"the searcher stopped proposing after {len(spans)} trials")
        driver = max(driver, ready) + asking[-1]
        end = driver + TRIAL_SECONDS * judge.cost(asked[1])
        heapq.heappush(running, (end, *asked))
        heapq.heappush(free, end)
        spans.append((driver, end))
    first, last = spans[0][0], max(start for start, _ in spans)
    busy = sum(min(end, last) - start for start, end in spans)
    return {
        "workers": workers,
        "trials": len(spans),
        "utilisation": round(busy / (workers * (last - first)), 4),
        "suggestion_seconds_median": round(statistics.median(asking), 4),
        "suggestion_seconds_max": round(max(asking), 4),
    }


def cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.machine())


if __name__ == "__main__":
    main()
