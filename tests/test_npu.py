"""What runs on a worker, on a stand-in for an NPU: it computes what a CPU does, on npu:0, and says where it was."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import npu_stand_in
import numpy as np
import pytest
import torch
import yaml
from driver import embedded_part

from search_spaces import family_of
from search_spaces.plan import PruningPlan, Ranking
from search_spaces.ratios import Cell
from trainables.absorb import absorb_gates
from trainables.checkpoints import load_state
from trainables.devices import describe, device_problem, torch_device
from trainables.export import export
from trainables.importance import rank
from trainables.long_finetune import finetune
from trainables.probe import run_probe
from trainables.profiling import profile
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.tasks import (
    AbsorbTask,
    ExportTask,
    FinetuneTask,
    ProbeTask,
    ProfileTask,
    RankTask,
    Task,
    TimingTask,
    TrialTask,
)
from trainables.timing import time_plans
from trainables.trial import Trial
from trainables.workspace import Workspace

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
NAME = "Stand-in NPU"
PLAN = PruningPlan.parse("attn:0,5,9 act:1,2,11")
CLOSE = 1e-4
"""Of the largest value."""

Elsewhere = Callable[..., Any]
"""Calls a function of this file in a process that has the NPU."""


@pytest.fixture(scope="module")
def on_npu(npu_host: Path) -> Iterator[Elsewhere]:
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=npu_stand_in.use, initargs=(str(npu_host),)) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The embedded model and some of its images, on the CPU."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"train": 320, "probe": 100, "val": 200, "test": 200}
    told = yaml.safe_load(embedded_part(folder, sizes, data={"subset": 160}).read_text())
    return Task(ModelSettings(**told["model"]), DataSettings(**told["data"]), 0, "cpu", 1, "zero")


def there(task: Any) -> Any:
    return replace(task, device="npu")


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


def where_a_tensor_lies(name: str) -> tuple[str, str, str]:
    device = torch_device(name)
    return device_problem(name), str(torch.ones(3, device=device).sum().sqrt().device), describe(device)


def test_the_device_is_found_and_named(on_npu) -> None:
    assert on_npu(where_a_tensor_lies, "npu") == ("", "npu:0", NAME)
    assert "torch_npu, which is not installed on this machine" in device_problem("npu")


def logits_and_gradients(task: Task, plan: PruningPlan) -> dict[str, np.ndarray]:
    """Return logits of the dense, gated, removed and merged model, and the gradients of the gates at 1."""
    workspace = Workspace(task)
    family, model = family_of(workspace.dense), workspace.dense.to(workspace.device).eval()
    pixels, labels = (part.to(workspace.device) for part in next(workspace.images("val").eval_batches(32)))
    with family.gates(model, task.attention) as gates:
        loss = torch.nn.functional.cross_entropy(model(pixels), labels)
        slopes = torch.stack(torch.autograd.grad(loss, list(gates.values())))
        with torch.no_grad():
            for unit in plan.units:
                gates[unit].zero_()
            gated = model(pixels)
    with torch.no_grad():
        dense = model(pixels)
        removed = family.remove(model, plan, task.attention)
        found = {"dense": dense, "slopes": slopes, "gated": gated, "removed": removed(pixels)}
        found["merged"] = family.merge(removed)(pixels)
    assert {each.device for each in found.values()} == {workspace.device}
    return {name: each.cpu().numpy() for name, each in found.items()}


@pytest.mark.parametrize("attention", ["zero", "identity", "double"])
def test_gates_remove_and_merge_agree_with_the_cpu(on_npu, task, attention) -> None:
    task = replace(task, attention=attention)
    expected, found = logits_and_gradients(task, PLAN), on_npu(logits_and_gradients, there(task), PLAN)
    for name in expected:
        assert_close(found[name], expected[name])
    for name in ("gated", "merged"):
        assert_close(found[name], found["removed"])
    assert np.abs(found["removed"] - found["dense"]).max() > 0.1


def trained(task: TrialTask, stop_after: int = 9) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    trial = Trial(Workspace(task), task, 0, PLAN, seed=3)
    steps = 0
    while not trial.done and steps < stop_after:
        record, steps = trial.step(), steps + 1
    state = load_state(trial.location)
    assert state is not None
    return record, state["training"]["model"]


def test_a_trial_trains_as_on_the_cpu_and_goes_on_from_its_state(on_npu, task, tmp_path) -> None:
    recipe = Recipe(epochs=2, batch_size=32, lr=3e-3, ema=0.9, distillation="soft", drop_path=0.1)
    tasks = [
        TrialTask(**vars(told), recipe=recipe, checkpoints=str(tmp_path / name))
        for name, told in {"cpu": task, "npu": there(task), "twice": there(task)}.items()
    ]
    (here, expected), (record, weights) = trained(tasks[0]), on_npu(trained, tasks[1])
    assert record["device"] == NAME
    assert record["cost"] == here["cost"]
    # A few of the 200 images may be on the border of two classes.
    assert np.abs(np.subtract(record["accuracies"], here["accuracies"])).max() <= 0.01
    assert max((weights[name] - expected[name]).abs().max() for name in expected) < 1e-3
    on_npu(trained, tasks[2], 1)
    again, resumed = on_npu(trained, tasks[2])
    assert again["accuracies"] == record["accuracies"]
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_units_are_ranked_as_on_the_cpu(on_npu, task) -> None:
    told = {**vars(task), "batches": 2}
    here, found = rank(RankTask(**told)), on_npu(rank, there(RankTask(**told)))
    for kind in ("attn", "act"):
        assert found[kind] == here[kind]


def test_the_probe_evaluates_cells_as_on_the_cpu(on_npu, task, tmp_path) -> None:
    recipe, cells = Recipe(epochs=1, batch_size=32, lr=1e-3), (Cell(0, 0), Cell(2, 4), Cell(6, 6))
    order = Ranking(tuple(range(12)), tuple(range(12)))
    tasks = [
        ProbeTask(**vars(told), recipe=recipe, ranking=order, lines=(), cells=cells, draw="uniform", sandwich=True,
                  folder=str(tmp_path / told.device))
        for told in (task, there(task))
    ]  # fmt: skip
    here, found = run_probe(tasks[0]), on_npu(run_probe, tasks[1])
    assert found["device"] == NAME
    for row, expected in zip(found["rows"], here["rows"], strict=True):
        assert row["cost"] == expected["cost"]
        assert abs(row["accuracy"] - expected["accuracy"]) <= 0.02  # two of 100 images


def test_gates_are_absorbed_as_on_the_cpu(on_npu, task, tmp_path) -> None:
    model = replace(task.model, name="vit_giant_patch14_dinov2", checkpoint="", gated="absorb")
    model = replace(model, kwargs={**model.kwargs, "embed_dim": 32, "depth": 2})
    told = AbsorbTask(**vars(replace(task, model=model)), weights=str(tmp_path / "weights"), batches=2)
    assert on_npu(absorb_gates, there(told))["errors"] == pytest.approx(absorb_gates(told)["errors"], rel=1e-3)


def test_plans_are_built_and_timed_there(on_npu, task) -> None:
    plans = (str(PLAN), str(PruningPlan(act=tuple(range(12)))))
    found = on_npu(time_plans, TimingTask(**vars(there(task)), batches=(8,), seconds=2.0, plans=plans))
    assert list(found) == list(plans)
    assert all(each["8"]["merged_seconds"] > 0 for each in found.values())


def test_the_profile_is_of_the_npu(on_npu, task) -> None:
    found = on_npu(profile, ProfileTask(**vars(there(task)), batches=(1, 8), seconds=6.0))
    assert (found["device"], found["dtype"]) == (NAME, "bfloat16")
    assert len(found["rows"]) == 25
    dense = found["rows"][0]
    assert dense["seconds_8"] > dense["seconds_1"] > 0
    assert all(0 < row["seconds_8"] < dense["seconds_8"] for row in found["rows"][1:])


@pytest.fixture(scope="module")
def exported(on_npu, task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an export that was made on the NPU from a fine-tune there."""
    folder = tmp_path_factory.mktemp("made")
    recipe = Recipe(epochs=1, batch_size=32, lr=3e-3)
    tuned = FinetuneTask(**vars(there(task)), recipe=recipe, plan=str(PLAN), folder=str(folder), inputs="inputs")
    assert on_npu(finetune, tuned, print)["device"] == NAME
    on_npu(export, ExportTask(**vars(there(task)), plan=str(PLAN), weights=tuned.weights, folder=f"{folder}/export"))
    return folder / "export"


def test_every_format_is_exported_compared_and_tested(exported: Path) -> None:
    summary = json.loads((exported / "summary.json").read_text())
    assert (summary["device"], summary["dtype"]) == (NAME, "bfloat16")
    devices = {name: each["device"] for name, each in summary["formats"].items()}
    assert devices == {"safetensors": "npu", "pt2": "npu", "onnx": "cpu"}
    assert all(each["agreement"] == 1.0 for each in summary["formats"].values())
    assert all(each["largest_logit_difference"] <= CLOSE for each in summary["formats"].values())
    assert set(summary["timing"]) == {"1", "64"}


def test_an_export_of_an_npu_loads_where_there_is_none(exported: Path) -> None:
    from trainables.export import load_pruned

    logits = load_pruned(str(exported))(torch.zeros(2, 1, 28, 28))
    assert (logits.shape, logits.device.type) == ((2, 10), "cpu")
