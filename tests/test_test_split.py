"""The test split is read by export, bench and report alone: in the code as written, and as it runs."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search_spaces.plan import PruningPlan
from trainables.data import View, load_images
from trainables.dense_check import check_dense, check_model
from trainables.export import export
from trainables.importance import rank
from trainables.long_finetune import finetune
from trainables.profiling import profile
from trainables.settings import Recipe
from trainables.tasks import ExportTask, FinetuneTask, ProfileTask, RankTask, Task, TrialTask
from trainables.trial import Trial
from trainables.workspace import Workspace

ROOT = Path(__file__).parents[1]
PACKAGES = ("search_spaces", "trainables", "dpt_search")
READERS = {"trainables/export.py", "trainables/bench.py", "dpt_search/report.py"}
FORWARDERS = {"trainables/data.py", "trainables/workspace.py"}
VIEW = View((1, 28, 28), (0.4,), (0.25,), "bicubic", 1.0)


def calls() -> list[tuple[str, ast.Call]]:
    """Return every call in the packages with the file it is in."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 30
    return [
        (str(path.relative_to(ROOT)), node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def test_only_the_readers_say_that_they_may():
    saying = {(file, kw.value) for file, call in calls() for kw in call.keywords if kw.arg == "may_read_test"}
    for file, value in saying:
        if file in FORWARDERS:
            assert isinstance(value, ast.Name), f"{file} decides by itself that it may read the test split"
        else:
            assert file in READERS, f"{file} may not read the test split"
    assert "trainables/export.py" in {file for file, _ in saying}


def test_permission_cannot_be_slipped_in_by_unpacking():
    readers = [(file, call) for file, call in calls() if name_of(call) in ("images", "load_images")]
    assert len(readers) > 8
    assert not [file for file, call in readers if any(keyword.arg is None for keyword in call.keywords)]


def test_only_the_readers_ask_for_it_by_name():
    asking = {
        file
        for file, call in calls()
        if name_of(call) in ("images", "load_images")
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]
        if isinstance(argument, ast.Constant) and argument.value == "test"
    }
    assert asking <= READERS
    assert asking


def test_images_are_decoded_behind_the_guard_only():
    opening = {file for file, call in calls() if name_of(call) == "open_tables"}
    assert opening <= {"trainables/data.py", "trainables/dense_check.py"}
    decoding = {file for file, call in calls() if name_of(call) in ("_cached_pixels", "_select", "_build")}
    assert decoding == {"trainables/data.py"}


@pytest.mark.parametrize("limit", [0, 6])
def test_a_reader_that_does_not_say_so_is_refused(tiny_data, tiny, limit):
    with pytest.raises(PermissionError, match="only export, bench and report"):
        load_images(tiny_data, "test", VIEW, 0, limit=limit)
    with pytest.raises(PermissionError, match="only export, bench and report"):
        Workspace(Task(tiny, tiny_data, 0, "cpu", 1, "zero")).images("test", limit)
    assert len(load_images(tiny_data, "test", VIEW, 0, limit=limit, may_read_test=True)) == (limit or 60)


def test_having_read_it_once_gives_no_other_reader_the_right(tiny, tiny_data):
    workspace = Workspace(Task(tiny, tiny_data, 0, "cpu", 1, "zero"))
    workspace.images("test", may_read_test=True)
    with pytest.raises(PermissionError):
        workspace.images("test")


@pytest.fixture
def unreadable_test(tiny_data, tmp_path):
    """The tiny data with a test split whose images cannot be decoded."""
    for split in ("train", "probe", "val", "test"):
        table = pq.read_table(f"{tiny_data.path}/{split}.parquet")
        if split == "test":
            table = table.set_column(0, "image", pa.array([b"not to be read"] * len(table)))
        pq.write_table(table, tmp_path / f"{split}.parquet")
    return replace(tiny_data, path=str(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_every_stage_but_export_runs_on_data_whose_test_images_cannot_be_read(tiny, unreadable_test, tmp_path):
    common = (tiny, unreadable_test, 0, "cpu", 1, "zero")
    recipe = Recipe(epochs=1, batch_size=32)
    check_model(Task(*common))
    with pytest.raises(ValueError, match="chance"):
        check_dense(Task(*common))
    profile(ProfileTask(*common, batches=(1,), seconds=0.05))
    rank(RankTask(*common, batches=1))
    trial = Trial(Workspace(Task(*common)), TrialTask(*common, recipe, str(tmp_path)), 0, PruningPlan((0,)), 0)
    assert np.isfinite(trial.step()["accuracies"]).all()
    task = FinetuneTask(*common, recipe, "attn:0", str(tmp_path / "finetune"), "")
    finetune(task, lambda record: None)
    with pytest.raises(ValueError, match=r"cannot decode the image in row 0 of .*test\.parquet"):
        export(ExportTask(*common, "attn:0", task.weights, str(tmp_path / "export"), formats=("safetensors",)))
