"""How long does a suggestion take?

    OMP_NUM_THREADS=1 python benchmarks/suggestion_time.py [--repeats 7] [--out benchmarks/results/suggestion_time.json]

The time of one `study.ask`, from the trials of a study in memory to a cell: MapSampler beside Optuna's TPE and GP
samplers as `dpt_search/samplers.py` makes them, one after the other in every repeat; medians of wall time and of this
process's CPU time. `map` knows the dense model's accuracy and what a probe of 16 cells says, `map/no-probe` the former
alone. Two lattices: 13 x 13 with nine budgets, observations drawn from `benchmarks/tables/fashion_mnist.parquet` and a
probe beside it; and 25 x 25 with nineteen, observations and, half as steep, the probe of a smooth synthetic surface,

    0.9 - 0.25 a^3 - 0.15 g^2 - 0.2 a g - 0.3 sigmoid(20 (a - 0.9))    of the ratios a and g,

with normal noise of 0.3 points. A history is MapSampler's initial design and then cells drawn at random with
replacement, so some are observed several times. The parts of MapSampler's time are measured one by one.
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import TrialState

from dpt_search.hints import smooth as smooth_hint
from dpt_search.map_sampler import MapSampler, initial_design
from dpt_search.posterior import Data, Hint
from dpt_search.probe_seeds import read_probes
from dpt_search.samplers import make_sampler, params_of, search_space
from dpt_search.surface_table import read_table
from search_spaces.goals import Goal, unit_goals
from search_spaces.ratios import Cell, RatioSpace, spread

HERE = Path(__file__).parent
OUT = HERE / "results" / "suggestion_time.json"
SAMPLERS = ("map", "map/no-probe", "tpe", "gp")
NOISE = 0.003
PENDING = 64
PACKAGES = ("numpy", "scipy", "optuna", "torch")


@dataclass(frozen=True)
class Case:
    """A lattice, what is to be decided, and what is known.

    Attributes:
        space: the lattice.
        budgets: what is to be decided.
        cells: of the finished trials, in order.
        accuracies: of them.
        pending: cells of trials that run.
        dense: the dense model's accuracy.
        probe: what a probe says.
    """

    space: RatioSpace
    budgets: Sequence[Goal]
    cells: list[Cell]
    accuracies: list[float]
    pending: list[Cell]
    dense: float
    probe: Hint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    rows = []
    for side, observations in ((13, 20), (13, 100), (13, 300), (25, 20), (25, 100), (25, 1000)):
        row = measure(real_case(observations) if side == 13 else smooth_case(side, observations), args.repeats)
        rows.append({"lattice": f"{side} x {side}", "observations": observations, "pending": PENDING, **row})
        print(line_of(rows[-1]), flush=True)
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    about = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": threads, "repeats": args.repeats, **versions()}
    about["load"] = [round(load, 1) for load in os.getloadavg()]
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"about": about, "cases": rows}, indent=1) + "\n")


def line_of(row: dict) -> str:
    times = ", ".join(
        f"{name} {row[name]['cpu_ms']:,.1f} ms (wall {row[name]['wall_ms']:,.1f}, of TPE's {row[name]['of_tpe']:.2f})"
        for name in SAMPLERS
    )
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in row["map_parts_cpu_ms"].items())
    return f"{row['lattice']}, {row['observations']} observations, {row['pending']} pending: {times}; of map: {parts}"


def real_case(observations: int) -> Case:
    table = read_table(str(HERE / "tables" / "fashion_mnist.parquet"))
    truth = dict(zip(table.cells, np.nanmean(table.accuracies, axis=1), strict=True))
    probes = read_probes(str(HERE / "tables" / "fashion_mnist.probes.parquet"))
    assert probes is not None
    said = dict(zip(probes.cells, probes.accuracies[:, 0], strict=True))
    return case(table.space, range(4, 21, 2), truth, said, observations)


def smooth_case(side: int, observations: int) -> Case:
    space = RatioSpace(side - 1, side - 1)
    truth = {cell: smooth(*space.ratios(cell)) for cell in space}
    return case(space, range(4, 41, 2), truth, {cell: value / 2 for cell, value in truth.items()}, observations)


def smooth(a: float, g: float) -> float:
    return float(0.9 - 0.25 * a**3 - 0.15 * g**2 - 0.2 * a * g - 0.3 / (1 + np.exp(-20 * (a - 0.9))))


def case(space: RatioSpace, units: range, truth: dict[Cell, float], said: dict[Cell, float], observations: int) -> Case:
    generator = np.random.default_rng(0)
    lattice = list(space)
    budgets = list(unit_goals(space, *units))
    design = initial_design(space, budgets)
    drawn, pending = (
        [lattice[i] for i in generator.integers(0, len(lattice), n)] for n in (observations - len(design), PENDING)
    )
    cells = design + drawn
    accuracies = [truth[cell] + NOISE * generator.standard_normal() for cell in cells]
    probed = spread(space, said, 16)
    probe = smooth_hint(space, probed, np.array([said[cell] for cell in probed]), None, length=1)
    return Case(space, budgets, cells, accuracies, pending, truth[Cell(0, 0)], probe)


def measure(found: Case, repeats: int) -> dict:
    """Time every sampler in turn, `repeats` times; the first round is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SAMPLERS}
    for repeat in range(repeats + 1):
        for name in SAMPLERS:
            spent = suggestion(found, name, seed=repeat)
            times[name] += [spent] * (repeat > 0)
    wall = {name: statistics.median(w for w, _ in times[name]) for name in SAMPLERS}
    cpu = {name: statistics.median(c for _, c in times[name]) for name in SAMPLERS}
    row: dict = {
        name: {"wall_ms": 1e3 * wall[name], "cpu_ms": 1e3 * cpu[name], "of_tpe": cpu[name] / cpu["tpe"]}
        for name in SAMPLERS
    }
    return {**row, "map_parts_cpu_ms": parts(found, repeats)}


def suggestion(found: Case, name: str, seed: int) -> tuple[float, float]:
    """Return wall and CPU seconds of one ask of a study that was not asked before."""
    name, _, variant = name.partition("/")
    hints = () if variant else (found.probe,)
    sampler = make_sampler(name, found.space, found.budgets, seed=seed, hints=lambda: hints, dense=found.dense)
    space = search_space(name, found.space, found.budgets)
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def add(cell: Cell, value: float | None) -> None:
        state = TrialState.RUNNING if value is None else TrialState.COMPLETE
        params = params_of(cell, name, found.space, found.budgets)
        study.add_trial(optuna.create_trial(state=state, value=value, params=params, distributions=space))

    for cell, accuracy in zip(found.cells, found.accuracies, strict=True):
        add(cell, accuracy)
    for cell in found.pending:
        add(cell, None)
    return clocked(lambda: study.ask(space))


def clocked(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def parts(found: Case, repeats: int) -> dict[str, float]:
    """Return where MapSampler's CPU time goes, in ms: medians of each part alone."""
    sampler = MapSampler(found.space, found.budgets, hints=lambda: (found.probe,), dense=found.dense)
    sampler._take_hints()
    index = {cell: i for i, cell in enumerate(found.space)}
    data = Data.of(np.array([index[cell] for cell in found.cells]), np.array(found.accuracies))
    pending = np.array([index[cell] for cell in found.pending])
    models = sampler._blend.models
    learnt = [model.fit(data)[0] for model in models]
    asked = np.union1d(sampler._feasible, pending)
    running = np.searchsorted(asked, pending)
    beliefs = sampler._blend.by_model(data, asked)
    expected = [(weight, each.with_pending(running)) for weight, each in beliefs]
    worked = {
        "fit": lambda: sampler._blend.fit(data),
        "posterior": lambda: [model.posterior(data, hyper, asked) for model, hyper in zip(models, learnt, strict=True)],
        "pending": lambda: [each.with_pending(running) for _, each in beliefs],
        "knowledge gradient": lambda: sampler._worth(expected, asked),
    }
    return {name: 1e3 * statistics.median(clocked(work)[1] for _ in range(repeats)) for name, work in worked.items()}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
