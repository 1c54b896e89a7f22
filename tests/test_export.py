"""The fine-tune's weights merged, written, loaded elsewhere and compared."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from search_spaces.plan import PruningPlan
from trainables.checkpoints import load_state
from trainables.dense import BadModel, load_weights, read_weights
from trainables.engine import choices, evaluate
from trainables.export import BadMerge, check_reloaded, export, load_pruned
from trainables.formats import BadFormat, load_format, write_formats
from trainables.intervals import accuracy_interval, paired_difference
from trainables.long_finetune import finetune
from trainables.settings import Recipe
from trainables.tasks import FORMATS, ExportTask, FinetuneTask
from trainables.timing import count_macs, count_params
from trainables.workspace import Workspace

# To convert a model to ONNX alone takes seconds on an idle core.
pytestmark = pytest.mark.timeout(300)
PLAN = "attn:1 act:0,2"
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.02, ema=0.9)


@pytest.fixture(scope="module")
def finetuned(tiny, tiny_data, tmp_path_factory):
    """A fine-tune that is done, its task, and what it reported."""
    folder = str(tmp_path_factory.mktemp("finetune"))
    task = FinetuneTask(tiny, tiny_data, 0, "cpu", 1, "zero", RECIPE, PLAN, folder, "inputs")
    reports = []
    return task, finetune(task, reports.append), reports


@pytest.fixture(scope="module")
def exported(finetuned, tmp_path_factory):
    """An export of the fine-tune, and its summary."""
    done, _, _ = finetuned
    folder = str(tmp_path_factory.mktemp("export") / "of")
    task = ExportTask(done.model, done.data, 0, "cpu", 1, "zero", PLAN, done.weights, folder, batches=(1, 4), repeats=6)
    return task, export(task)


def unmerged(task: ExportTask) -> torch.nn.Module:
    model = Workspace(task).pruned(PruningPlan.parse(task.plan))
    load_weights(model, read_weights(task.weights), task.weights)
    return model.eval()


def test_a_finetune_reports_every_epoch_and_leaves_its_weights(finetuned):
    task, result, reports = finetuned
    assert result["epochs"] == reports
    assert [record["epoch"] for record in reports] == [1, 2]
    assert result["accuracy"] == reports[-1]["accuracy"]
    assert json.loads(Path(task.progress).read_text())["epochs"] == reports
    workspace = Workspace(task)
    model = workspace.pruned(PruningPlan.parse(PLAN))
    weights, average = read_weights(task.weights), load_state(task.state)["training"]["ema"]
    assert weights.keys() == average.keys()
    assert all(torch.equal(weights[name], average[name]) for name in weights)
    load_weights(model, weights, "")
    assert evaluate(model, workspace.images("val"), workspace.device).mean() == result["accuracy"]


def test_a_finetune_that_was_interrupted_ends_as_one_that_was_not(finetuned, tmp_path):
    done, result, _ = finetuned
    task = replace(done, folder=str(tmp_path))

    def interrupt(record: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(task, interrupt)
    reports = []
    again = finetune(task, reports.append)
    assert [record["epoch"] for record in reports] == [2]
    assert [e["accuracy"] for e in again["epochs"]] == [e["accuracy"] for e in result["epochs"]]
    assert Path(task.weights).read_bytes() == Path(done.weights).read_bytes()


def test_a_finetune_of_other_inputs_begins_anew(finetuned, tmp_path):
    done, _, _ = finetuned
    shutil.copytree(done.folder, tmp_path / "copy")
    reports = []
    finetune(replace(done, folder=str(tmp_path / "copy"), inputs="others"), reports.append)
    assert [record["epoch"] for record in reports] == [1, 2]


def test_an_export_computes_what_the_unmerged_model_does(exported):
    task, summary = exported
    pixels = torch.randn(16, 1, 28, 28)
    with torch.inference_mode():
        expected, found = unmerged(task)(pixels), load_pruned(task.folder)(pixels)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert 0 <= summary["largest_logit_difference"] <= 1e-4


def test_an_export_loads_elsewhere_by_the_packages_own_function(exported, tmp_path):
    task, _ = exported
    code = (
        "import sys, numpy, torch, dpt_search\n"
        "model = dpt_search.load_pruned(sys.argv[1])\n"
        "assert not model.training\n"
        "numpy.save(sys.argv[2], model(torch.ones(2, 1, 28, 28)).detach().numpy())"
    )
    command = [sys.executable, "-c", code, task.folder, str(tmp_path / "logits.npy")]
    paths = os.pathsep.join(filter(None, sys.path))
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, check=True)
    with torch.inference_mode():
        expected = unmerged(task)(torch.ones(2, 1, 28, 28)).numpy()
    assert np.allclose(np.load(tmp_path / "logits.npy"), expected, rtol=1e-4, atol=1e-5)


def test_the_files_of_an_export_are_written_and_say_what_they_are(exported):
    task, summary = exported
    folder = Path(task.folder)
    assert {path.name for path in folder.iterdir()} == {*FORMATS.values(), "plan.json", "summary.json"}
    assert json.loads((folder / "summary.json").read_text()) == summary
    description = json.loads((folder / "plan.json").read_text())
    assert description["plan"] == PLAN
    assert description["model"]["checkpoint"] == ""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert "blocks.1.attn.qkv.weight" not in weights
    assert weights["blocks.0.mlp.weight"].shape == (32, 32)


def test_the_summary_holds_the_tested_accuracy_size_and_speed_of_both(exported):
    task, summary = exported
    workspace = Workspace(task)
    test = workspace.images("test", may_read_test=True)
    merged = load_pruned(task.folder)
    for name, model in {"dense": workspace.dense, "merged": merged}.items():
        right = evaluate(model, test, workspace.device)
        assert summary[name] == {
            **accuracy_interval(right),
            "images": 60,
            "params": count_params(model),
            "macs": count_macs(model, (1, 28, 28)),
        }
    assert summary["merged"]["macs"] < summary["dense"]["macs"]
    assert summary["merged"]["params"] < summary["dense"]["params"]
    gain = summary["merged"]["accuracy"] - summary["dense"]["accuracy"]
    assert summary["difference"]["mean"] == pytest.approx(gain)
    for batch in ("1", "4"):
        timing = summary["timing"][batch]
        assert timing["low"] <= timing["speedup"] <= timing["high"]
        assert timing["dense_seconds"] > 0


LOADED_ALONE = {
    "pt2": (
        "import sys, numpy, torch\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "logits = lambda pixels: model(torch.from_numpy(pixels)).detach().numpy()\n"
    ),
    "onnx": (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "logits = lambda pixels: session.run(['logits'], {'pixels': pixels})[0]\n"
        "assert 'torch' not in sys.modules\n"
    ),
}


@pytest.mark.parametrize("name", LOADED_ALONE)
def test_a_format_loads_without_this_package_and_takes_any_batch(exported, tmp_path, name):
    task, _ = exported
    code = (
        f"{LOADED_ALONE[name]}"
        "numpy.savez(sys.argv[2], *(logits(numpy.load(given)) for given in sys.argv[3:]))\n"
        "assert not {'dpt_search', 'trainables', 'search_spaces', 'timm'} & set(sys.modules)\n"
    )
    batches = [torch.randn(images, 1, 28, 28) for images in (1, 3, 16)]
    given = [tmp_path / f"{len(pixels)}.npy" for pixels in batches]
    for path, pixels in zip(given, batches, strict=True):
        np.save(path, pixels.numpy())
    command = [sys.executable, "-I", "-c", code, f"{task.folder}/{FORMATS[name]}", tmp_path / "logits.npz", *given]
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, found = unmerged(task), np.load(tmp_path / "logits.npz")
    for pixels, logits in zip(batches, found.values(), strict=True):
        with torch.inference_mode():
            expected = model(pixels).numpy()
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_every_format_is_tested_and_timed_after_loading(exported):
    task, summary = exported
    workspace = Workspace(task)
    test = workspace.images("test", may_read_test=True)
    expected = choices(unmerged(task), test, workspace.device)
    assert list(summary["formats"]) == list(FORMATS)
    for name, row in summary["formats"].items():
        loaded = load_pruned(task.folder)
        if name != "safetensors":
            loaded = load_format(f"{task.folder}/{FORMATS[name]}", workspace.device)
        chosen = choices(loaded, test, workspace.device)
        assert row["accuracy"] == np.mean(chosen == test.labels)
        assert row["agreement"] == np.mean(chosen == expected) == 1
        assert (row["file"], row["images"], row["device"]) == (FORMATS[name], 60, "cpu")
        assert 0 <= row["largest_logit_difference"] <= 1e-4
        for batch in ("1", "4"):
            timing = row["timing"][batch]
            assert timing["low"] <= timing["speedup"] <= timing["high"]
    assert summary["formats"]["safetensors"]["timing"]["4"]["seconds"] == summary["timing"]["4"]["merged_seconds"]


def test_only_the_formats_asked_for_are_written_and_a_baseline_is_compared(exported, tmp_path):
    task, summary = exported
    baseline = FinetuneTask(
        task.model, task.data, 0, "cpu", 1, "zero", RECIPE, "dense", str(tmp_path / "baseline"), "inputs"
    )
    finetune(baseline, lambda record: None)
    small = replace(task, folder=str(tmp_path / "of"), formats=("safetensors",), baseline=baseline.weights)
    found = export(small)
    assert list(found["formats"]) == ["safetensors"]
    assert not {"model.pt2", "model.onnx"} & {path.name for path in Path(small.folder).iterdir()}
    dense = Workspace(task).dense
    load_weights(dense, read_weights(baseline.weights), "")
    test = Workspace(task).images("test", may_read_test=True)
    trained, merged = (evaluate(model, test, torch.device("cpu")) for model in (dense, unmerged(task)))
    assert found["baseline"]["accuracy"] == np.mean(trained) != found["dense"]["accuracy"]
    assert found["baseline"]["difference"] == paired_difference(trained, merged)
    assert found["baseline"]["macs"] == found["dense"]["macs"]
    assert all(found[name] == summary[name] for name in ("dense", "merged", "difference"))
    assert "baseline" not in summary


@pytest.mark.parametrize(("name", "factor"), [("pt2", 1.01), ("onnx", float("nan"))])
def test_a_wrong_merge_is_caught_in_every_format(exported, tmp_path, name, factor):
    task, _ = exported
    wrong = load_pruned(task.folder)
    with torch.no_grad():
        wrong.blocks[2].mlp.weight *= factor
    write_formats([name], str(tmp_path), wrong, (1, 28, 28))
    with pytest.raises(BadMerge, match=f"as {name}, differs from the unmerged one by"):
        check_reloaded(str(tmp_path), name, unmerged(task), Workspace(task).images("val"))


@pytest.mark.parametrize("name", LOADED_ALONE)
def test_a_format_that_does_not_load_is_refused(exported, tmp_path, name):
    task, _ = exported
    (tmp_path / FORMATS[name]).write_bytes(b"gone")
    with pytest.raises(BadMerge, match=f"as {name}, does not load in a fresh process: ") as raised:
        check_reloaded(str(tmp_path), name, unmerged(task), Workspace(task).images("val"))
    assert "\n" not in str(raised.value)
    for location, words in ((FORMATS[name], "cannot load"), (f"nowhere/{FORMATS[name]}", "does not exist")):
        with pytest.raises(BadFormat, match=words):
            load_format(str(tmp_path / location), torch.device("cpu"))


class Unwritable(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels if pixels.sum() > 0 else -pixels


def test_a_model_that_cannot_be_written_says_what_to_do(tmp_path):
    with pytest.raises(BadFormat, match=r"cannot write the model as pt2: .*leave it out of --export-formats") as raised:
        write_formats(["pt2"], str(tmp_path), Unwritable(), (1, 28, 28))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_an_export_that_computes_something_else_is_refused(exported, tmp_path, factor):
    task, _ = exported
    folder = tmp_path / "copy"
    shutil.copytree(task.folder, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["blocks.2.mlp.weight"] *= factor
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(BadMerge, match="differs from the unmerged one by"):
        check_reloaded(str(folder), "safetensors", unmerged(task), Workspace(task).images("val"))


def test_an_export_that_does_not_load_is_refused(exported, tmp_path):
    task, _ = exported
    shutil.copytree(task.folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(BadMerge, match=r"does not load in a fresh process: .*cannot read weights") as raised:
        check_reloaded(str(tmp_path / "copy"), "safetensors", unmerged(task), Workspace(task).images("val"))
    assert "\n" not in str(raised.value)


def test_an_export_whose_plan_is_not_that_of_its_weights_does_not_load(exported, tmp_path):
    task, _ = exported
    folder = tmp_path / "copy"
    shutil.copytree(task.folder, folder)
    description = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**description, "plan": "attn:1"}))
    with pytest.raises(BadModel, match="does not fit the model"):
        load_pruned(str(folder))
    with pytest.raises(FileNotFoundError):
        load_pruned(str(tmp_path / "nowhere"))
