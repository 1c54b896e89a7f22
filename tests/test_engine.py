"""The training loop and the evaluation loop."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SIDE
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import family_of
from search_spaces.plan import PruningPlan
from trainables import engine
from trainables.checkpoints import load_state, save_state
from trainables.data import View, load_images
from trainables.dense import build_model
from trainables.engine import Diverged, Training, _logits, accuracy_and_loss, evaluate
from trainables.importance import importance, rank
from trainables.objective import distillation_loss
from trainables.settings import Recipe
from trainables.tasks import RankTask

CPU = torch.device("cpu")
VIEW = View((1, SIDE, SIDE), (0.4,), (0.25,), "bicubic", 1.0)
RECIPE = Recipe(epochs=3, batch_size=32, lr=8e-3)
RECIPES = {
    "plain": RECIPE,
    "ema": replace(RECIPE, ema=0.9),
    "mixup": replace(RECIPE, mixup=0.8, cutmix=1.0),
    "soft": replace(RECIPE, distillation="soft"),
    "hard": replace(RECIPE, distillation="hard", distillation_alpha=1.0),
    "drop_path": replace(RECIPE, drop_path=0.3),
    "warmup": replace(RECIPE, warmup_epochs=1.5, clip_grad=0.0),
    "augment": replace(RECIPE, random_erasing=0.5, auto_augment="rand-m5-inc1"),
}


@pytest.fixture(scope="module")
def train(tiny_data):
    return load_images(tiny_data, "train", VIEW, 0, limit=96)


@pytest.fixture(scope="module")
def val(tiny_data):
    return load_images(tiny_data, "val", VIEW, 0)


@pytest.fixture
def begin(tiny, train):
    """Make a training of a pruned model; what is not said is the same for all."""

    def make(recipe: Recipe, *, seed: int = 1, weights: int = 0, images=train, **rest) -> Training:
        model = build_model(tiny, seed=weights, drop_path=recipe.drop_path)
        family_of(model).remove(model, PruningPlan.parse("attn:1 act:2"), "zero")
        teacher = build_model(tiny, seed=7) if recipe.distillation != "none" else None
        return Training(model, images, recipe, device=CPU, seed=seed, teacher=teacher, **rest)

    return make


def run(training: Training, epochs: int = 3) -> Training:
    for _ in range(epochs):
        training.run_epoch()
    return training


def weights_of(training: Training) -> list[torch.Tensor]:
    return [*training.model.state_dict().values(), *training.result.state_dict().values()]


def same(first: Training, second: Training) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights_of(first), weights_of(second), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(begin, name):
    first = run(begin(RECIPES[name]), 1)
    torch.rand(17)
    assert same(first, run(begin(RECIPES[name]), 1))
    assert not same(first, run(begin(RECIPES[name], seed=2), 1))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("after", [1, 2])
def test_a_training_that_goes_on_from_disk_ends_bit_for_bit_as_one_that_never_stopped(begin, tmp_path, name, after):
    whole = run(begin(RECIPES[name]))
    place = str(tmp_path / "state.pt")
    save_state(place, run(begin(RECIPES[name]), after).state_dict())
    resumed = begin(RECIPES[name], weights=5)
    resumed.load_state_dict(load_state(place))
    assert resumed.epochs_done == after
    run(resumed, 3 - after)
    assert resumed.epochs_done == 3
    assert same(whole, resumed)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_differs_from_the_plain_one(begin, name):
    assert name == "plain" or not same(run(begin(RECIPES[name]), 1), run(begin(RECIPE), 1))


def test_training_learns_what_there_is_to_learn(begin, val):
    training = begin(replace(RECIPE, epochs=12, batch_size=16, lr=0.06, crop_scale=1.0, label_smoothing=0.0))
    before = evaluate(training.result, val, CPU).mean()
    losses = [training.run_epoch().loss for _ in range(12)]
    assert before < 0.6
    assert losses[-1] < 0.3 * losses[0]
    assert evaluate(training.result, val, CPU).mean() > 0.9


def test_an_epoch_says_what_it_did(begin):
    training = begin(replace(RECIPE, batch_size=40))
    epochs = [training.run_epoch(), training.run_epoch()]
    assert [epoch.number for epoch in epochs] == [1, 2]
    assert [epoch.images for epoch in epochs] == [80, 80]
    assert all(epoch.seconds > 0 for epoch in epochs)


@pytest.mark.parametrize(("count", "parts"), [(96, 1), (95, 2), (94, 5)])
def test_the_loss_of_an_epoch_is_the_mean_over_its_batches(begin, train, count, parts):
    still = Recipe(batch_size=24, lr=0.0, min_lr=0.0, label_smoothing=0.0, crop_scale=1.0, hflip=0.0)
    still = replace(still, micro_batch=-(-24 // parts))
    images = replace(train, pixels=train.pixels[:count], labels=train.labels[:count])
    training = begin(still, images=images)
    batches = list(images.train_batches(still, 1, 0))
    with torch.no_grad():
        expected = [float(F.cross_entropy(training.model(pixels), labels)) for pixels, labels in batches]
    epoch = training.run_epoch()
    assert epoch.loss == pytest.approx(np.mean(expected), rel=1e-4)
    assert epoch.images == sum(len(labels) for _, labels in batches)


def test_every_epoch_draws_other_crops(begin, train):
    """All images are one image, and nothing is learnt, so only the crops can make losses differ."""
    images = replace(train, pixels=np.repeat(train.pixels[:1], 96, 0), labels=np.zeros(96, np.int64))
    training = begin(replace(RECIPE, lr=0.0, min_lr=0.0, crop_scale=0.3), images=images)
    assert training.run_epoch().loss != training.run_epoch().loss


def test_the_learning_rate_warms_up_and_ends_low_after_all_epochs(begin):
    recipe = replace(RECIPE, epochs=4, warmup_epochs=1.0, min_lr=1e-5)
    training, peak = begin(recipe), recipe.lr * recipe.batch_size / 512
    rates = []
    for _ in range(4):
        training.run_epoch()
        rates.append(training.state_dict()["optimizer"]["param_groups"][0]["lr"])
    steps = 96 // 32
    assert rates[0] == pytest.approx(1e-5 + (peak - 1e-5) * (steps - 1) / steps)
    cosine = [1e-5 + (peak - 1e-5) * (1 + np.cos(np.pi * (n * steps - 1) / (4 * steps))) / 2 for n in (2, 3, 4)]
    assert rates[1:] == pytest.approx(cosine)


def test_a_loss_that_is_no_number_stops_the_training_and_counts_no_epoch(begin):
    training = begin(replace(RECIPE, lr=1e30))
    with pytest.raises(Diverged, match=r"loss became (nan|inf) in epoch 1: lower the learning rate"):
        training.run_epoch()
    assert training.epochs_done == 0


def test_fewer_images_than_a_batch_are_refused(begin):
    with pytest.raises(ValueError, match="96 training images are fewer than one batch of 97"):
        begin(replace(RECIPE, batch_size=97))


def test_the_teacher_stays_as_it_is_and_pulls_the_student_towards_it(tiny, train, val):
    teacher = build_model(tiny, seed=7)
    state = copy.deepcopy(teacher.state_dict())
    student = build_model(tiny, seed=0)
    recipe = replace(RECIPE, epochs=6, distillation="soft", distillation_alpha=1.0, temperature=1.0)
    pixels, _ = next(val.eval_batches(48))

    def distance() -> float:
        with torch.inference_mode():
            return float(F.mse_loss(student.eval()(pixels).softmax(1), teacher(pixels).softmax(1)))

    before = distance()
    run(Training(student, train, recipe, device=CPU, seed=0, teacher=teacher), 6)
    assert distance() < 0.3 * before
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


logit_rows = st.lists(st.lists(st.floats(-8, 8), min_size=4, max_size=4), min_size=1, max_size=5)


@given(logit_rows, st.floats(0.5, 5))
def test_soft_distillation_is_the_divergence_at_the_temperature_times_its_square(rows, temperature):
    taught = torch.tensor(rows, dtype=torch.float64)
    logits = taught.flip(1)
    recipe = Recipe(distillation="soft", temperature=temperature)
    p, q = (np.exp(x.numpy() / temperature) for x in (taught, logits))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert float(distillation_loss(logits, taught, recipe)) == pytest.approx(expected, abs=1e-9)
    assert float(distillation_loss(taught, taught, recipe)) == pytest.approx(0, abs=1e-9)


def test_hard_distillation_is_the_cross_entropy_with_the_teachers_choice():
    logits, taught = torch.randn(6, 4), torch.randn(6, 4)
    expected = -logits.log_softmax(1)[torch.arange(6), taught.argmax(1)].mean()
    assert torch.allclose(distillation_loss(logits, taught, Recipe(distillation="hard")), expected)


@pytest.mark.parametrize("batch_size", [7, 48, 256])
def test_evaluation_is_what_a_plain_loop_finds(tiny, val, batch_size):
    model = build_model(tiny, seed=3, drop_path=0.9).train()
    right = evaluate(model, val, CPU, batch_size=batch_size)
    plain = build_model(tiny, seed=3)
    expected, losses = [], []
    with torch.no_grad():
        for picture, label in zip(val.pixels, val.labels, strict=True):
            pixels = (torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255 - 0.4) / 0.25
            logits = plain(pixels)[0]
            expected.append(int(logits.argmax()) == label)
            losses.append(-float(logits.log_softmax(0)[label]))
    assert right.tolist() == expected
    assert right.dtype == bool
    accuracy, loss = accuracy_and_loss(model, val, CPU, batch_size=batch_size)
    assert accuracy == right.mean()
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)


def test_what_is_done_with_outputs_is_not_cast(tiny, val, monkeypatch):
    monkeypatch.setattr(engine, "autocast", lambda *_: torch.autocast("cpu", torch.bfloat16))
    for _ in _logits(build_model(tiny, seed=3), val, CPU, True, 20, 0):
        assert not torch.is_autocast_enabled("cpu")


def test_evaluation_sees_every_image_once_in_order_normalised(val):
    batches = list(val.eval_batches(batch_size=20))
    assert [len(labels) for _, labels in batches] == [20, 20, 8]
    assert np.array_equal(np.concatenate([labels for _, labels in batches]), val.labels)
    pixels = np.concatenate([pixels for pixels, _ in batches])[:, 0]
    assert np.allclose(pixels, (val.pixels[..., 0] / 255 - 0.4) / 0.25, atol=1e-5)


def test_importance_is_the_slope_of_the_loss_in_each_gate(tiny, val):
    model = build_model(tiny, seed=3)
    found = importance(model, val, CPU, 1, "zero")
    pixels, labels = next(val.eval_batches(64))
    with family_of(model).gates(model, "zero") as gates, torch.no_grad():

        def loss_at(gate: torch.Tensor, value: float) -> float:
            gate.fill_(value)
            return float(F.cross_entropy(model(pixels).double(), labels))

        slopes = {unit: (loss_at(gate, 1.01) - loss_at(gate, 0.99), gate.fill_(1))[0] for unit, gate in gates.items()}
    assert found == pytest.approx({unit: abs(slope) / 0.02 for unit, slope in slopes.items()}, rel=0.02, abs=2e-5)
    assert min(found.values()) > 2e-4


def test_a_ranking_has_every_unit_by_growing_importance_and_is_the_same_again(tiny, tiny_data):
    task = RankTask(tiny, tiny_data, 0, "cpu", 1, "zero", batches=2)
    found = rank(task)
    for kind in ("attn", "act"):
        assert sorted(found[kind]) == [0, 1, 2, 3]
        assert found["importance"][kind] == sorted(found["importance"][kind])
        assert len(set(found["importance"][kind])) == 4
    assert found == rank(task)
