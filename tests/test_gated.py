"""Gated MLPs made plain: exact where it can be, an honest error where not, and then ordinary removal."""

import copy
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from conftest import SIDE

from search_spaces import family_of, offered
from search_spaces.gated import absorb, gated_paths, make_plain
from search_spaces.plan import PruningPlan
from search_spaces.timm_compat import timm
from trainables.absorb import absorb_gates
from trainables.dense import BadModel, build_model
from trainables.tasks import AbsorbTask

KINDS = {"packed": timm.layers.SwiGLUPacked, "split": timm.layers.SwiGLU, "glu": timm.layers.GluMlp}
SMALL = {
    "img_size": SIDE,
    "patch_size": 7,
    "in_chans": 1,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 3,
}


@pytest.fixture(params=KINDS)
def gated(request):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL, mlp_layer=KINDS[request.param]).eval()


def batches(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, 1, SIDE, SIDE, generator=generator) for _ in range(4)]


def values_of(mlp: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the half that the activation does not see."""
    if isinstance(mlp, timm.layers.SwiGLU):
        return mlp.fc1_x.weight, mlp.fc1_x.bias
    half = slice(0, len(mlp.fc1.bias) // 2) if mlp.gate_last else slice(len(mlp.fc1.bias) // 2, None)
    return mlp.fc1.weight[half], mlp.fc1.bias[half]


@torch.no_grad()
def test_a_gate_that_multiplies_by_constants_is_absorbed_exactly(gated):
    for block in gated.blocks:
        weight, bias = values_of(block.mlp)
        weight.zero_()
        bias.copy_(torch.linspace(-1, 2, len(bias)))
    dense, pixels = copy.deepcopy(gated), batches(5)[0]
    errors = absorb(gated, batches())
    assert list(errors) == [f"blocks.{i}.mlp" for i in range(3)]
    assert max(errors.values()) < 0.02
    assert torch.allclose(gated(pixels), dense(pixels), atol=0.02 * float(dense(pixels).abs().max()))


@torch.no_grad()
def test_the_error_is_that_on_other_images_and_less_than_that_of_leaving_the_mlp_out(gated):
    dense = copy.deepcopy(gated)
    errors = absorb(gated, batches())
    assert all(0 < error < 1 for error in errors.values())
    seen = []
    hook = dense.blocks[0].mlp.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    dense(batches(7)[0])
    hook.remove()
    missed = (gated.blocks[0].mlp(seen[0][0]) - seen[0][1]).norm() / seen[0][1].norm()
    assert float(missed) == pytest.approx(errors["blocks.0.mlp"], rel=0.2)


def test_then_activations_are_units_and_merge(gated):
    assert offered(gated).act == ()
    assert all("--gated absorb" in reason for reason in offered(gated).refused.values())
    absorb(gated, batches())
    assert gated_paths(gated) == []
    assert offered(gated).act == (0, 1, 2)
    family, pixels = family_of(gated), batches(9)[0]
    family.remove(gated, PruningPlan.parse("attn:1 act:0,2"), "zero")
    expected = gated(pixels)
    assert torch.allclose(family.merge(gated)(pixels), expected, atol=1e-5)


def test_weights_written_load_into_a_model_made_plain(tiny, tiny_data, tmp_path):
    model = replace(tiny, name="vit_giant_patch14_dinov2", gated="absorb")
    path = str(tmp_path / "absorbed.safetensors")
    told = absorb_gates(AbsorbTask(model, tiny_data, 0, "cpu", 1, "zero", weights=path, batches=2))
    assert len(told["errors"]) == 4
    loaded = build_model(replace(model, checkpoint=path))
    state = safetensors.torch.load_file(path)
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
    assert set(make_plain(build_model(replace(model, gated="keep"))).state_dict()) == set(state)


def test_a_model_without_gates_has_none_to_absorb(tiny, tiny_data, tmp_path):
    task = AbsorbTask(replace(tiny, gated="absorb"), tiny_data, 0, "cpu", 1, "zero", weights=str(tmp_path / "w"))
    with pytest.raises(BadModel, match="no gated MLP"):
        absorb_gates(task)
