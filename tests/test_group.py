"""One model trained by several processes, with no Ray: the same steps as one alone takes."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SIDE
from groups import in_a_group

from search_spaces import family_of
from search_spaces.plan import PruningPlan
from trainables.data import View, load_images
from trainables.dense import build_model
from trainables.engine import ALONE, Training
from trainables.group import Group
from trainables.long_finetune import finetune
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.tasks import FinetuneTask

VIEW = View((1, SIDE, SIDE), (0.4,), (0.25,), "bicubic", 1.0)
LONG = Recipe(epochs=9, batch_size=16, lr=8e-3, distillation="soft", random_erasing=0.3)
"""54 steps."""
SHORT = replace(LONG, epochs=1)
RECIPES = {
    "plain": LONG,
    "ragged": replace(SHORT, batch_size=15),
    "parts": replace(SHORT, micro_batch=3),
    "mixed": replace(SHORT, mixup=0.8, cutmix=1.0, repeated_augmentation=3),
    "average": replace(SHORT, ema=0.9, drop_path=0.2),
    "recomputed": replace(SHORT, recompute_activations=True),
}
pytestmark = pytest.mark.timeout(120)
Weights = dict[str, torch.Tensor]


def begin(group: Group, recipe: Recipe, model: ModelSettings, data: DataSettings) -> Training:
    train = load_images(data, "train", VIEW, 0, limit=96)
    pruned = build_model(model, seed=0, drop_path=recipe.drop_path)
    family_of(pruned).remove(pruned, PruningPlan.parse("attn:1 act:2"), "zero")
    return Training(
        pruned, train, recipe, device=torch.device("cpu"), seed=1, group=group, teacher=build_model(model, seed=7)
    )


def trained(training: Training, epochs: int) -> tuple[Weights, Weights, list[float]]:
    """Train, and return weights, those of the result, and losses."""
    losses = [training.run_epoch().loss for _ in range(epochs)]
    return training.model.state_dict(), training.result.state_dict(), losses


def all_trained(group: Group, model: ModelSettings, data: DataSettings, task: FinetuneTask) -> dict[str, Any]:
    found = {name: trained(begin(group, recipe, model, data), recipe.epochs) for name, recipe in RECIPES.items()}
    # Killed after four epochs, and begun again.
    first = begin(group, LONG, model, data)
    trained(first, 4)
    again = begin(group, LONG, model, data)
    state = copy.deepcopy(first.state_dict())
    again.load_state_dict(copy.deepcopy(state))
    reports: list[dict[str, Any]] = []
    finetune(task, reports.append, group)
    return {**found, "resumed": trained(again, 5), "state": state, "reports": reports}


@pytest.fixture(scope="module")
def task(tiny, tiny_data, tmp_path_factory) -> FinetuneTask:
    return FinetuneTask(
        tiny, tiny_data, 0, "cpu", 1, "zero", replace(SHORT, mixup=0.5), "attn:1 act:2",
        str(tmp_path_factory.mktemp("finetune")), "inputs", workers=3, fewest=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(tiny, tiny_data, task) -> list[dict[str, Any]]:
    """What each of two workers, of at most three, found."""
    load_images(tiny_data, "train", VIEW, 0, limit=96)
    return in_a_group(2, all_trained, tiny, tiny_data, task, most=3)


@pytest.fixture(scope="module")
def alone(tiny, tiny_data) -> dict[str, Any]:
    wanted = {name: replace(recipe, micro_batch=0, recompute_activations=False) for name, recipe in RECIPES.items()}
    return {
        name: trained(begin(ALONE, recipe, tiny, tiny_data), recipe.epochs)
        for name, recipe in wanted.items()
        if name != "average"
    }


def difference(first: Weights, second: Weights) -> float:
    """Return the largest relative difference of a weight tensor.

    A bias of the keys moves all scores of a query alike, which the softmax takes away: its gradient is rounding alone,
    and Adam makes steps of any gradient.
    """

    def relevant(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[:32], tensor[64:]]) if name.endswith("qkv.bias") else tensor

    pairs = [(relevant(name, tensor), relevant(name, second[name])) for name, tensor in first.items()]
    return max(float((a - b).norm() / a.norm().clamp_min(1e-3)) for a, b in pairs)


@pytest.mark.parametrize("name", [*(name for name in RECIPES if name != "average"), "resumed"])
def test_two_workers_take_the_steps_that_one_takes(two, alone, name):
    """All but drop-path, which each worker draws for itself."""
    weights, _, losses = two[0][name]
    expected, _, expected_losses = alone["plain" if name == "resumed" else name]
    assert difference(weights, expected) < 1e-5
    assert losses == pytest.approx(expected_losses[-len(losses) :], rel=1e-4)


def test_what_two_workers_began_one_ends_and_the_other_way_round(two, alone, tiny, tiny_data):
    training = begin(ALONE, LONG, tiny, tiny_data)
    training.load_state_dict(two[0]["state"])
    assert difference(trained(training, 5)[0], alone["plain"][0]) < 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_weights_moving_average_and_loss_are_the_same_on_every_worker_bit_for_bit(two, name):
    for first, second in zip(two[0][name][:2], two[1][name][:2], strict=True):
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert two[0][name][2] == two[1][name][2]
    if name == "average":
        assert not torch.equal(two[0][name][0]["head.weight"], two[0][name][1]["head.weight"])


def test_every_worker_evaluates_its_part_and_all_report_the_same(two, task, tmp_path):
    first, second = two[0]["reports"][0], two[1]["reports"][0]
    assert first == second | {name: first[name] for name in ("images_per_second", "seconds")}
    assert first["workers"] == 2
    alone: list[dict[str, Any]] = []
    assert finetune(replace(task, folder=str(tmp_path)), alone.append, Group(most=3))["workers"] == 1
    assert first["accuracy"] == pytest.approx(alone[0]["accuracy"], abs=1.01 / 48)
    assert first["loss"] == pytest.approx(alone[0]["loss"], rel=1e-4)
