"""What training may do differently without another outcome: less memory, half precision, compiled."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SIDE

from search_spaces import BadInput, family_of
from search_spaces.blocks import blocks_of
from search_spaces.plan import PruningPlan
from search_spaces.timm_compat import timm
from trainables import devices
from trainables.checkpoints import load_state, save_state
from trainables.data import View, load_images
from trainables.dense import build_model
from trainables.devices import DEVICES, half_precision
from trainables.engine import Training, evaluate
from trainables.recomputing import check_recomputing, recompute_activations
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.tasks import Task

CPU = torch.device("cpu")
VIEW = View((1, SIDE, SIDE), (0.4,), (0.25,), "bicubic", 1.0)
RECIPE = Recipe(epochs=2, batch_size=32, lr=8e-3, ema=0.9)


@pytest.fixture(scope="module")
def train(tiny_data):
    return load_images(tiny_data, "train", VIEW, 0, limit=96)


@pytest.fixture
def begin(tiny, train):
    def make(recipe: Recipe = RECIPE) -> Training:
        model = build_model(tiny, seed=0)
        family_of(model).remove(model, PruningPlan.parse("attn:1 act:2"), "zero")
        return Training(model, train, recipe, device=CPU, seed=1)

    return make


def ended(training: Training, epochs: int = 2) -> torch.Tensor:
    """Return all weights after some epochs, but for the keys' biases, whose gradients are rounding alone."""
    for _ in range(epochs):
        training.run_epoch()
    state = {**training.model.state_dict(), **{f"ema.{k}": v for k, v in training.result.state_dict().items()}}
    return torch.cat([tensor.flatten() for name, tensor in state.items() if not name.endswith("qkv.bias")])


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / first.norm())


@pytest.mark.parametrize("size", [1, 5, 16, 31])
def test_a_batch_in_parts_makes_the_same_step(begin, size):
    assert difference(ended(begin()), ended(begin(replace(RECIPE, micro_batch=size)))) < 1e-5


def test_betas_are_the_optimisers(begin):
    other = replace(RECIPE, betas=[0.5, 0.95])
    assert begin(other).state_dict()["optimizer"]["param_groups"][0]["betas"] == (0.5, 0.95)
    assert difference(ended(begin()), ended(begin(other))) > 1e-4


def counted(model: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    for number, (_, block, _) in enumerate(blocks_of(model)):
        next(block.children()).register_forward_hook(lambda *_, number=number: calls.append(number))
    return calls


def test_activations_are_computed_again_and_the_outcome_is_the_same(begin):
    plain, again = begin(), begin(replace(RECIPE, recompute_activations=True))
    calls, more = counted(plain.model), counted(again.model)
    assert torch.equal(ended(plain), ended(again))
    assert len(more) == 2 * len(calls) > 0


def test_blocks_recompute_where_timm_cannot():
    """PiT has no activation checkpointing of timm's."""
    models = [timm.create_model("pit_ti_224", img_size=64, num_classes=5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    recompute_activations(models[1], blocks_stay=True)
    calls = [counted(model) for model in models]
    pixels = torch.rand(2, 3, 64, 64)
    grads = []
    for model in models:
        model.eval()(pixels).square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert len(calls[1]) == 2 * len(calls[0]) > 0
    with torch.no_grad():
        assert torch.equal(models[0](pixels), models[1](pixels))
    task = Task(ModelSettings("pit_ti_224", {"img_size": 64}), DataSettings(), 0, "cpu", 1, "zero")
    with pytest.raises(BadInput, match="recompute_activations cannot be had for PoolingVisionTransformer"):
        check_recomputing(task)
    check_recomputing(replace(task, model=ModelSettings("vit_tiny_patch16_224")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_ends_near_full_and_goes_on_from_disk_bit_for_bit(begin, monkeypatch, tmp_path, dtype):
    full = ended(begin())
    monkeypatch.setitem(DEVICES, "cpu", replace(DEVICES["cpu"], autocast=dtype))
    half = begin()
    whole = ended(half)
    assert 0 < difference(full, whole) < 0.1
    assert bool(half.state_dict()["scaler"]) == (dtype == "float16")
    first = begin()
    ended(first, 1)
    save_state(str(tmp_path / "state.pt"), first.state_dict())
    again = begin()
    again.load_state_dict(load_state(str(tmp_path / "state.pt")))
    assert torch.equal(ended(again, 1), whole)


def test_gradients_that_overflow_are_left_out_and_the_scale_becomes_smaller(begin, monkeypatch):
    monkeypatch.setitem(DEVICES, "cpu", replace(DEVICES["cpu"], autocast="float16"))
    training = begin(replace(RECIPE, ema=0.0))
    state = training.state_dict()
    state["scaler"]["scale"] = 2.0**60
    training.load_state_dict(state)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.run_epoch()
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items())
    assert training.state_dict()["scaler"]["scale"] == 2.0**57


@pytest.mark.parametrize(("has_it", "dtype"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_without_bfloat16_uses_float16(monkeypatch, has_it, dtype):
    said = SimpleNamespace(is_bf16_supported=lambda including_emulation=True: including_emulation or has_it)
    monkeypatch.setattr(devices, "_torch_module", lambda device: said)
    assert half_precision(torch.device("cuda")) == dtype
    assert half_precision(CPU) == ""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_compiled_training_takes_the_same_steps_and_keeps_the_names_of_weights(begin, train):
    plain, compiled = begin(), begin(replace(RECIPE, compile=True))
    names = list(compiled.state_dict()["model"])
    assert difference(ended(plain), ended(compiled)) < 1e-4
    assert list(compiled.state_dict()["model"]) == names == list(plain.state_dict()["model"])
    assert (evaluate(plain.result, train, CPU) == evaluate(compiled.result, train, CPU)).mean() > 0.98
