"""What stays of a removed attention: formulas, the decay, merging and exports, for each of the three."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import loud
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import doubling, surgery
from search_spaces.blocks import Left
from search_spaces.plan import Attention, PruningPlan
from search_spaces.timm_compat import timm
from trainables.dense import build_model, load_weights, read_weights
from trainables.engine import FADING, Training, evaluate, left_at
from trainables.export import BadMerge, check_reloaded, export, load_pruned, write_model
from trainables.formats import load_format
from trainables.importance import importance
from trainables.long_finetune import finetune
from trainables.settings import Recipe
from trainables.tasks import FORMATS, ExportTask, FinetuneTask, TrialTask
from trainables.timing import count_macs, merged_without
from trainables.trial import Trial
from trainables.workspace import Workspace

# To convert a model to ONNX alone takes seconds on an idle core.
pytestmark = pytest.mark.timeout(300)
CPU = torch.device("cpu")
PLAN = PruningPlan.parse("attn:1,3 act:0,3")
RECIPE = Recipe(epochs=3, batch_size=32, lr=0.02, ema=0.9, distillation="soft")
SMALL = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def small(**kwargs) -> torch.nn.Module:
    """Return a small model whose every weight matters, layer scales too."""
    torch.manual_seed(0)
    return loud(timm.create_model("vit_tiny_patch16_224", **SMALL, **kwargs).eval())


def logits(model: torch.nn.Module) -> torch.Tensor:
    pixels = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(pixels)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=get_args(Attention))
def attention(request):
    return request.param


FORMULAS = {
    "zero": lambda block, x: x,
    "identity": lambda block, x: x + block.ls1(block.norm1(x)),
    "double": lambda block, x: 2 * x,
}


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_block_computes_the_formula(attention, scale):
    dense, x = small(init_values=scale), torch.randn(2, 17, 32)
    block = dense.blocks[2]
    with torch.no_grad():
        half = FORMULAS[attention](block, x)
        expected = half + block.ls2(block.mlp(block.norm2(half)))
        act_gone = half + block.ls2(block.mlp.fc2(block.mlp.fc1(block.norm2(half))))
        for text, wanted in (("attn:2", expected), ("attn:2 act:2", act_gone)):
            removed = surgery.remove(copy.deepcopy(dense), PruningPlan.parse(text), attention)
            assert torch.allclose(removed.blocks[2](x), wanted, atol=1e-6)


def test_drop_path_in_training_drops_what_identity_leaves_and_not_what_double_does():
    dense, x = small(drop_path_rate=1.0), torch.randn(2, 17, 32)
    for each, rest in (("identity", x), ("double", 2 * x), ("zero", x)):
        model = surgery.remove(copy.deepcopy(dense), PruningPlan.parse("attn:3"), each)
        # The last block drops every branch.
        assert torch.equal(model.train().blocks[3](x), rest)


@pytest.mark.parametrize("scale", [None, 0.5])
@given(left=st.floats(0, 1))
def test_a_fading_block_computes_the_decay(scale, left):
    dense = small(init_values=scale)
    x, block = torch.randn(2, 17, 32), dense.blocks[2]
    with torch.no_grad():
        half = (2 - left) * x + left * block.ls1(block.attn(block.norm1(x)))
        expected = half + block.ls2(block.mlp(block.norm2(half)))
        surgery.fade(dense, left, PruningPlan.parse("attn:2"))
        assert torch.allclose(dense.blocks[2](x), expected, atol=1e-5)


def test_what_fades_keeps_its_weights_and_ends_as_what_is_removed():
    dense, model, plan = small(), small(), PruningPlan.parse("attn:0,2")
    surgery.fade(model, 1.0, plan)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert torch.equal(logits(model), logits(dense))
    surgery.fade(model, 0.0, plan)
    assert torch.equal(logits(model), logits(surgery.remove(small(), plan, "double")))
    assert torch.equal(logits(surgery.remove(model, plan, "double")), logits(surgery.remove(dense, plan, "double")))


def test_at_inference_double_costs_what_zero_does_and_computes_the_same_bit_for_bit():
    for kwargs in ({}, {"init_values": 0.5, "global_pool": "avg"}, {"proj_bias": False}):
        unmerged = surgery.remove(small(**kwargs), PruningPlan.parse("attn:0,2,3"), "double")
        merged = surgery.merge(copy.deepcopy(unmerged))
        assert doublings(merged) == 0
        assert torch.equal(logits(merged), logits(unmerged))
        assert torch.equal(logits(surgery.merge(merged)), logits(unmerged))


@pytest.mark.parametrize(
    "kwargs", [{"norm_layer": timm.layers.RmsNorm}, {"final_norm": False}, {"mlp_layer": timm.layers.GluMlp}]
)
def test_a_factor_that_cannot_be_folded_exactly_stays(kwargs):
    unmerged = surgery.remove(small(**kwargs), PruningPlan.parse("attn:0,2"), "double")
    merged = surgery.merge(copy.deepcopy(unmerged))
    assert doublings(merged) == 2
    assert torch.equal(logits(merged), logits(unmerged))


def test_pooling_by_attention_before_the_last_norm_keeps_the_factor():
    unmerged = surgery.remove(small(global_pool="map", fc_norm=True), PruningPlan.parse("attn:1"), "double")
    assert difference(logits(surgery.merge(copy.deepcopy(unmerged))), logits(unmerged)) <= 1e-6


def test_the_layer_scale_of_an_identity_goes_into_the_norm():
    unmerged = surgery.remove(small(init_values=0.5), PruningPlan.parse("attn:1"), "identity")
    merged = surgery.merge(copy.deepcopy(unmerged))
    assert isinstance(merged.blocks[1].ls1, torch.nn.Identity)
    assert isinstance(merged.blocks[0].ls1, timm.layers.LayerScale)
    assert difference(logits(merged), logits(unmerged)) <= 1e-6


def test_two_semantics_in_one_model_merge_exactly():
    first = surgery.remove(small(init_values=0.5), PruningPlan.parse("attn:0"), "double")
    unmerged = surgery.remove(first, PruningPlan.parse("attn:2 act:1"), "identity")
    assert difference(logits(surgery.merge(copy.deepcopy(unmerged))), logits(unmerged)) <= 1e-6


def test_the_three_are_ranked_by_their_own_gates(tiny, tiny_data):
    task = TrialTask(tiny, tiny_data, 0, "cpu", 1, "zero", RECIPE, "")
    images = Workspace(task).images("train", 64)
    for method in ("taylor", "conditional"):
        found = [
            importance(build_model(tiny, seed=3), images, CPU, 1, each, method=method) for each in get_args(Attention)
        ]
        attn = [{u: v for u, v in of.items() if u.kind == "attn"} for of in found]
        assert attn[0] != attn[1] != attn[2] != attn[0]


@given(st.integers(1, 5000), st.data())
def test_what_is_left_goes_linearly_from_one_to_zero(steps, data):
    assert left_at(0, steps) == 1
    assert left_at(steps, steps) == 0
    step = data.draw(st.integers(0, steps))
    assert left_at(step, steps) == pytest.approx(max(0, 1 - step / steps / FADING))
    if step >= FADING * steps:
        assert left_at(step, steps) == 0


def lefts(model: torch.nn.Module) -> list[Left]:
    return [module for module in model.modules() if isinstance(module, Left)]


def doublings(model: torch.nn.Module) -> int:
    return sum(stays == "double" for left in lefts(model) for stays in left.removed.values())


def gates_of(model: torch.nn.Module) -> set[float]:
    return {gate for left in lefts(model) for gate, _ in left.gates.values()}


def test_a_training_fades_step_by_step(tiny, tiny_data, monkeypatch):
    task = TrialTask(tiny, tiny_data, 0, "cpu", 1, "double", RECIPE, "")
    workspace, seen = Workspace(task), []
    model, fade = workspace.to_train(PLAN)
    images = workspace.images("train", 96)
    training = Training(model, images, RECIPE, device=CPU, seed=0, teacher=workspace.dense, fade=fade)
    model.register_forward_pre_hook(lambda *_: seen.append(gates_of(model)))
    for epoch in range(1, 4):
        training.run_epoch()
        assert gates_of(training.model) == gates_of(training.result) == {left_at(3 * epoch, 9)}
    assert seen == [{left_at(step, 9)} for step in range(9)]
    assert seen[0] == {1.0}
    assert gates_of(training.result) == {0.0}


@pytest.fixture
def task(tiny, tiny_data, tmp_path):
    return TrialTask(tiny, tiny_data, 0, "cpu", 1, "double", RECIPE, str(tmp_path / "states"))


def begin(task: TrialTask) -> Trial:
    return Trial(Workspace(task), task, 0, PLAN, seed=11)


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_trial_begun_again_ends_as_one_that_never_stopped(task, attention, tmp_path, stopped_after):
    task = replace(task, attention=attention)
    elsewhere, places = replace(task, checkpoints=str(tmp_path / "elsewhere")), [tmp_path / "a", tmp_path / "b"]
    whole, stopped = begin(task), begin(elsewhere)
    expected = [whole.step() for _ in range(3)][-1]
    for _ in range(stopped_after):
        stopped.step()
    resumed = begin(elsewhere)
    found = [resumed.step() for _ in range(max(1, 3 - stopped_after))][-1]
    assert found | {"seconds": 0} == expected | {"seconds": 0}
    for trial, place in zip((whole, resumed), places, strict=True):
        trial.write_weights(str(place))
    assert places[0].read_bytes() == places[1].read_bytes()


def test_a_trial_that_fades_ends_as_the_removed_model_and_pays_for_the_attentions(task, tmp_path):
    trial, workspace = begin(task), Workspace(task)
    record = [trial.step() for _ in range(3)][-1]
    trial.write_weights(str(tmp_path / "weights"))
    val = workspace.images("val")
    removed = evaluate(workspace.pruned(PLAN), val, CPU).mean()
    assert record["removed_accuracy"] == removed
    assert evaluate(workspace.pruned(PLAN, str(tmp_path / "weights")), val, CPU).mean() == record["accuracies"][-1]
    size = workspace.view.input_size
    dense, gone = count_macs(workspace.dense, size), count_macs(workspace.pruned(PLAN), size)
    assert record["cost"] == pytest.approx(3 * 96 * 4 * dense + 48 * (gone + 3 * dense))


@pytest.fixture(scope="module", params=get_args(Attention))
def finetuned(request, tiny, tiny_data, tmp_path_factory):
    """A fine-tune that is done: its task and result."""
    folder = str(tmp_path_factory.mktemp("finetune"))
    task = FinetuneTask(tiny, tiny_data, 0, "cpu", 1, request.param, RECIPE, str(PLAN), folder, "inputs")
    return task, finetune(task, lambda record: None)


def export_task(done: FinetuneTask, folder: Path, **rest) -> ExportTask:
    base = (done.model, done.data, 0, "cpu", 1, done.attention, done.plan, done.weights, str(folder))
    return ExportTask(*base, batches=(2,), repeats=2, **rest)


def unmerged(task: ExportTask) -> torch.nn.Module:
    model = Workspace(task).pruned(PLAN)
    load_weights(model, read_weights(task.weights), task.weights)
    return model.eval()


def test_a_finetune_that_was_interrupted_ends_as_one_that_was_not(finetuned, tmp_path):
    done, result = finetuned
    task = replace(done, folder=str(tmp_path))

    def interrupt(record: dict) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            finetune(task, interrupt)
    again = finetune(task, lambda record: None)
    assert [e["accuracy"] for e in again["epochs"]] == [e["accuracy"] for e in result["epochs"]]
    assert Path(task.weights).read_bytes() == Path(done.weights).read_bytes()


def test_every_format_computes_what_the_unmerged_model_does(finetuned, tmp_path):
    task = export_task(finetuned[0], tmp_path / "export")
    summary = export(task)
    assert json.loads((tmp_path / "export" / "plan.json").read_text())["attention"] == task.attention
    pixels, model = torch.randn(5, 1, 28, 28), unmerged(task)
    loaded = [load_format(f"{task.folder}/{FORMATS[name]}", CPU) for name in ("pt2", "onnx")]
    with torch.inference_mode():
        for found in (load_pruned(task.folder), *loaded):
            assert difference(found(pixels), model(pixels)) <= 1e-5
    assert all(of["largest_logit_difference"] <= 1e-4 for of in summary["formats"].values())


def test_an_export_of_an_earlier_version_is_one_of_zero(finetuned, tmp_path):
    task = export_task(finetuned[0], tmp_path)
    write_model(task, Workspace(task), unmerged(task))
    described = json.loads((tmp_path / "plan.json").read_text())
    del described["attention"]
    (tmp_path / "plan.json").write_text(json.dumps(described))
    if task.attention == "identity":
        with pytest.raises(ValueError, match="does not fit the model"):
            load_pruned(task.folder)
    else:
        same = difference(logits(load_pruned(task.folder)), logits(unmerged(task))) <= 1e-5
        assert same == (task.attention == "zero")


@pytest.mark.parametrize(
    ("module", "attention", "name", "wrong"),
    [
        (surgery, "double", "fold_doubling", lambda model: [setattr(m, "eps", 0.0) for m in model.modules()]),
        (doubling, "double", "_scaling", lambda branch, post: [torch.ones(1)]),
        (surgery, "identity", "fold_scale", lambda block: block.norm1.weight.data.mul_(1.1)),
    ],
)
def test_a_wrong_merge_is_caught(tiny, tiny_data, tmp_path, monkeypatch, module, attention, name, wrong):
    task = ExportTask(tiny, tiny_data, 0, "cpu", 1, attention, str(PLAN), "", str(tmp_path))
    workspace = Workspace(task)
    model = workspace.pruned(PLAN).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = workspace.images("val")
    write_model(task, workspace, model)
    assert check_reloaded(task.folder, "safetensors", model, images) <= 1e-4
    monkeypatch.setattr(module, name, wrong)
    write_model(task, workspace, model)
    with pytest.raises(BadMerge):
        check_reloaded(task.folder, "safetensors", model, images)


def test_what_merges_is_what_is_timed(tiny, attention):
    dense = build_model(tiny, seed=3)
    expected = surgery.merge(surgery.remove(copy.deepcopy(dense), PLAN, attention))
    assert torch.equal(logits(merged_without(dense, PLAN, attention)), logits(expected))
