"""The dense model: built, its weights read, its accuracy checked, and what is said when it cannot be used."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CLASSES, TINY_SPLITS

from search_spaces import BadInput
from search_spaces.timm_compat import timm
from trainables.data import View
from trainables.dense import BadModel, build_model, load_weights, read_weights
from trainables.dense_check import check_dense, check_model
from trainables.engine import Training
from trainables.locations import write_bytes
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.tables import BadData
from trainables.tasks import Task
from trainables.workspace import Workspace


@pytest.fixture
def weights(tiny):
    """Weights of the tiny model that are not those of its default seed."""
    return build_model(tiny, seed=42).state_dict()


def write(path, state) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_is_built_ready_for_inference_and_fixed_by_its_seed(tiny):
    model = build_model(tiny, seed=1)
    assert not model.training
    assert model.num_classes == CLASSES
    assert equal(model.state_dict(), build_model(tiny, seed=1).state_dict())
    assert not equal(model.state_dict(), build_model(tiny, seed=2).state_dict())


def test_drop_path_changes_training_only(tiny):
    plain, dropping = build_model(tiny, seed=1), build_model(tiny, seed=1, drop_path=0.9)
    pixels = torch.randn(4, 1, 28, 28)
    assert torch.equal(plain(pixels), dropping(pixels))
    assert not torch.equal(plain.train()(pixels), dropping.train()(pixels))


@pytest.mark.parametrize(
    ("name", "wrapper"), [("w.safetensors", ""), ("w.pt", ""), ("w.pt", "state_dict"), ("w.pt", "model")]
)
def test_weights_are_read_from_either_format_and_from_timms_wrappers(tmp_path, tiny, weights, name, wrapper):
    place = write(tmp_path / name, {wrapper: weights, "epoch": 3} if wrapper else weights)
    assert equal(build_model(replace(tiny, checkpoint=place)).state_dict(), weights)
    assert equal(read_weights(f"file://{place}"), weights)


def test_of_average_and_plain_weights_the_average_is_read(tmp_path, weights):
    plain = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    place = write(tmp_path / "w.pt", {"state_dict": plain, "state_dict_ema": weights})
    assert equal(read_weights(place), weights)


def test_a_new_head_keeps_all_but_the_classifier(tmp_path, tiny, weights):
    checkpoint = write(tmp_path / "w.safetensors", weights)
    settings = replace(tiny, checkpoint=checkpoint, kwargs={**tiny.kwargs, "num_classes": 7}, new_head=True)
    state = build_model(settings).state_dict()
    assert state["head.weight"].shape == (7, 32)
    assert equal(
        {n: t for n, t in state.items() if "head" not in n}, {n: t for n, t in weights.items() if "head" not in n}
    )
    with pytest.raises(BadModel, match=r"head\.\w+ has shape"):
        build_model(replace(settings, new_head=False))


@pytest.mark.parametrize("name", ["blocks.2.mlp.fc1.weight", "pos_embed", "head.bias"])
def test_a_weight_of_another_shape_is_refused_naming_it_and_both_shapes(tiny, weights, name):
    model = build_model(tiny)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    shape = tuple(weights[name].shape)
    with pytest.raises(BadModel) as raised:
        load_weights(model, {**weights, name: torch.zeros(9, *shape)}, "my.safetensors")
    for part in ("'my.safetensors'", name, str((9, *shape)), str(shape), "model.kwargs"):
        assert part in str(raised.value)
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("gone", "added", "said"),
    [
        ("norm.bias", "", r"1 weights are missing and 0 unknown \(such as norm\.bias\)"),
        ("", "head_dist.bias", r"0 weights are missing and 1 unknown \(such as head_dist\.bias\)"),
        ("norm.bias", "fc_norm.bias", r"1 weights are missing and 1 unknown \(such as norm\.bias\)"),
    ],
)
def test_missing_and_unknown_weights_are_refused_naming_one(tiny, weights, gone, added, said):
    state = {name: tensor for name, tensor in weights.items() if name != gone}
    with pytest.raises(BadModel, match=said):
        load_weights(build_model(tiny), state | ({added: torch.zeros(3)} if added else {}), "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_file_of_no_weights_is_refused_in_one_line(tmp_path, name):
    place = tmp_path / name
    with pytest.raises(BadModel, match=r"w\.\w+' does not exist"):
        read_weights(str(place))
    for content in (b"", b"neither of both"):
        write_bytes(str(place), content)
        with pytest.raises(BadModel, match="cannot read weights from") as raised:
            read_weights(str(place))
        assert "\n" not in str(raised.value)


class Trap:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("code of the checkpoint was run",))


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(tmp_path, capsys):
    torch.save({"state_dict": Trap()}, tmp_path / "w.pt")
    with pytest.raises(BadModel, match="cannot read weights"):
        read_weights(str(tmp_path / "w.pt"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"model": [1]}, {"weight": 3}])
def test_a_checkpoint_that_is_no_state_dict_is_refused(tmp_path, tiny, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(BadModel, match="no weights by name"):
        build_model(replace(tiny, checkpoint=str(tmp_path / "w.pt")))


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("vit_tiny_patch16", {}, r"timm has no model 'vit_tiny_patch16'.*similar: vit"),
        ("", {}, "timm has no model ''"),
        ("zzz_none", {}, "timm has no model 'zzz_none'"),
        ("vit_tiny_patch16_224", {"depht": 3}, "cannot build vit_tiny_patch16_224 with .*depht"),
        ("vit_tiny_patch16_224", {"embed_dim": 30, "num_heads": 4}, "cannot build vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", {"img_size": "big"}, "cannot build vit_tiny_patch16_224"),
    ],
)
def test_a_model_that_timm_cannot_build_is_refused_in_one_line(name, kwargs, said):
    with pytest.raises(BadModel, match=said) as raised:
        build_model(ModelSettings(name, kwargs))
    assert isinstance(raised.value, BadInput)
    assert "\n" not in str(raised.value)


def test_the_models_named_as_similar_exist():
    with pytest.raises(BadModel) as raised:
        build_model(ModelSettings("deit_smal_patch16_224"))
    similar = str(raised.value).split("similar: ")[1].split(", ")
    assert similar
    assert all(timm.is_model(name) for name in similar)


@pytest.fixture
def task(tiny, tiny_data):
    return Task(tiny, tiny_data, 0, "cpu", 1, "zero")


def test_a_model_that_never_saw_the_data_is_refused_naming_the_likely_causes(task):
    with pytest.raises(BadModel, match=r"accuracy on val is .*% and chance is 33\.3%") as raised:
        check_dense(task)
    for cause in ("order of the labels", "data.mean and data.std", "model.checkpoint", "--adapt-epochs"):
        assert cause in str(raised.value)


@pytest.fixture(scope="module")
def learnt(tiny, tiny_data, tmp_path_factory):
    """The tiny model with weights that have learnt the tiny data."""
    workspace = Workspace(Task(tiny, tiny_data, 0, "cpu", 1, "zero"))
    recipe = Recipe(epochs=12, batch_size=16, lr=0.06, crop_scale=1.0)
    training = Training(workspace.dense, workspace.images("train"), recipe, device=workspace.device, seed=0)
    for _ in range(recipe.epochs):
        training.run_epoch()
    place = write(tmp_path_factory.mktemp("learnt") / "w.safetensors", training.model.state_dict())
    return replace(tiny, checkpoint=place)


def test_a_model_that_knows_the_data_passes_with_its_figures(task, learnt):
    found = check_dense(replace(task, model=learnt))
    assert found["low"] < found["accuracy"] < found["high"] or found["accuracy"] == 1
    assert found["accuracy"] > 0.8
    assert (found["images"], found["classes"], found["carved"]) == (48, CLASSES, [])
    assert found["splits"] == TINY_SPLITS
    assert found["chance"] == pytest.approx(1 / 3)


def test_the_order_of_the_labels_matters(task, learnt, tmp_path):
    state = read_weights(learnt.checkpoint)
    for name in ("head.weight", "head.bias"):
        state[name] = state[name].roll(1, 0)
    with pytest.raises(BadModel, match="order of the labels"):
        check_dense(replace(task, model=replace(learnt, checkpoint=write(tmp_path / "w.safetensors", state))))


def test_splits_taken_from_the_training_images_are_named(task, learnt, table_folder):
    data = replace(task.data, path=str(table_folder / "train.parquet"))
    assert check_dense(replace(task, model=learnt, data=data))["carved"] == ["val", "test"]


def test_checking_a_model_counts_its_units_and_meets_its_data(task):
    assert check_model(task) == {"attn": [0, 1, 2, 3], "act": [0, 1, 2, 3], "refused": []}
    with pytest.raises(BadData, match="does not exist"):
        check_model(replace(task, data=replace(task.data, path="/nowhere")))
    with pytest.raises(BadInput, match="no family describes the blocks of ResNet"):
        check_model(replace(task, model=ModelSettings("test_resnet", {"num_classes": CLASSES, "in_chans": 1})))


def test_the_images_of_a_workspace_are_loaded_once(task):
    workspace = Workspace(task)
    assert workspace.images("train", 30) is workspace.images("train", 30)
    assert np.array_equal(workspace.images("train", 30).labels, Workspace(task).images("train", 30).labels)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "efficientvit_b0"]
)
def test_any_model_takes_images_of_a_size_that_it_is_asked_to(name):
    model = build_model(ModelSettings(name, {"img_size": 64, "in_chans": 1, "num_classes": 5}))
    view = View.of(model, DataSettings(mean=[0.5], std=[0.5]))
    assert view.input_size == (1, 64, 64)
    assert model(torch.zeros(1, *view.input_size)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "kwargs", "resampled"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, "pos_embed"),
        ("swinv2_cr_tiny_224", {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}, ""),
        ("beit_base_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, "relative_position_bias_table"),
    ],
)
def test_a_checkpoint_of_another_image_size_fits(tmp_path, name, kwargs, resampled):
    there = ModelSettings(name, {**kwargs, "img_size": 128, "num_classes": 5})
    source = build_model(there, seed=7).state_dict()
    checkpoint = write(tmp_path / "w.safetensors", {key: weight.contiguous() for key, weight in source.items()})
    model = build_model(replace(there, kwargs={**there.kwargs, "img_size": 64}, checkpoint=checkpoint))
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, source[key]) or (resampled and resampled in key), key
    assert "state_dict" not in model.pretrained_cfg
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_a_size_that_a_model_cannot_take_is_refused_in_one_line():
    with pytest.raises(BadModel, match=r"timm cannot build levit_128s with .*img_size") as raised:
        build_model(ModelSettings("levit_128s", {"img_size": 100}))
    assert "\n" not in str(raised.value)
