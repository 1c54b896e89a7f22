"""Models and exports timed side by side: what can be named, what comes out, and what is refused."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from dpt_search.bench import Request, measure, parse, table
from dpt_search.config import BadConfig, RunConfig
from dpt_search.store import RunStore
from search_spaces import BadInput
from search_spaces.plan import PruningPlan
from trainables.bench import bench
from trainables.export import write_model
from trainables.formats import load_format, write_formats
from trainables.settings import ModelSettings
from trainables.tasks import BenchModel, BenchTask, ExportTask
from trainables.workspace import Workspace

PLAN = "attn:1 act:0,2"


@pytest.fixture(scope="module")
def run(tiny, tiny_data, tmp_path_factory):
    """A run directory with a configuration and an export: safetensors and pt2."""
    folder = tmp_path_factory.mktemp("run")
    store = RunStore(str(folder))
    store.write_json("run.json", {"config": asdict(replace(RunConfig(), model=tiny, data=tiny_data))})
    task = ExportTask(tiny, tiny_data, 0, "cpu", 1, "zero", PLAN, "", store.path("export"))
    workspace = Workspace(task)
    model = workspace.pruned(PruningPlan.parse(PLAN))
    write_model(task, workspace, model)
    write_formats(["pt2"], task.folder, model, (1, 28, 28))
    return folder


def task_of(*models: str, **others) -> BenchTask:
    return replace(BenchTask(tuple(map(parse, models)), "cpu", 1, (1, 4), 0.05), **others)


def test_everything_that_can_be_named_is_found(run, tiny, tiny_data):
    export = str(run / "export")
    assert parse(str(run)) == BenchModel(str(run), export)
    assert parse(export) == BenchModel(export, export)
    assert parse(f"{export}/") == BenchModel(f"{export}/", export)
    assert parse(f"{export}/model.pt2").location == f"{export}/model.pt2"
    assert parse(f"dense:{run}") == BenchModel(f"dense:{run}", model=tiny, data=tiny_data)
    assert parse("timm:deit_tiny_patch16_224").model == ModelSettings("deit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{run}/nothing", "name a run directory, an export/ folder"),
        ("{run}/nothing.onnx", "does not exist"),
        ("dense:{run}/nothing", "is no run directory"),
        ("{bare}", "run `dpt-search export` on it first"),
    ],
)
def test_what_is_not_there_is_one_line(run, tmp_path, name, words):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(BadInput, match=words) as raised:
        parse(name.format(run=run, bare=tmp_path))
    assert "\n" not in str(raised.value)


def test_every_model_is_timed_at_every_batch_size_and_compared_with_the_first(run):
    small = BenchModel("small", model=ModelSettings("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 12}))
    task = task_of(f"dense:{run}", str(run), f"{run}/export/model.pt2")
    found = bench(replace(task, models=(*task.models, small)))
    assert [(row["batch"], row["name"]) for row in found["rows"]] == [
        (batch, model.name) for batch in (1, 4) for model in (*task.models, small)
    ]
    assert [row["input_size"] for row in found["rows"][:4]] == [[1, 28, 28]] * 3 + [[3, 224, 224]]
    for row in found["rows"]:
        assert row["seconds"] > 0
        assert row["low"] <= row["ratio"] <= row["high"]
    assert all(row["ratio"] == row["low"] == row["high"] == 1 for row in found["rows"][::4])
    assert json.loads(json.dumps(found)) == found


def test_a_loaded_program_is_called_as_any_other_model(run):
    model = load_format(f"{run}/export/model.pt2", torch.device("cpu"))
    assert model.input_size == (1, 28, 28)
    assert model.to("cpu").eval()(torch.zeros(5, 1, 28, 28)).shape == (5, 3)


def test_a_compiler_that_is_missing_is_one_line(run, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    code = (
        "from trainables.compiling import check_compiler\nimport torch\n"
        "try:\n    check_compiler(torch.device('cpu'))\nexcept ValueError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("--compiled, or a recipe with compile, needs a compiler that torch can use")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(("batches", "threads", "seconds"), [((0,), 1, 1.0), ((1,), 0, 1.0), ((1,), 1, 0.0)])
def test_numbers_that_make_no_sense_are_refused(batches, threads, seconds):
    with pytest.raises(BadConfig, match="at least 1"):
        measure(Request(["timm:deit_tiny_patch16_224"], batches, "cpu", threads, seconds, False), lambda line: None)


def test_table_says_how_fast_and_against_what():
    row = {"name": "a", "batch": 64, "input_size": [3, 224, 224], "seconds": 0.032, "spread": 0.002}
    rows = [
        {**row, "ratio": 1.0, "low": 1.0, "high": 1.0},
        {**row, "name": "b", "ratio": 1.5, "low": 1.4, "high": 1.6},
    ]
    text = table({"device": "Xeon", "threads": 2, "dtype": "float32", "rows": rows}, compiled=False)
    for words in ("2,000", "32.00 ± 1.00", "1.50x (1.40 to 1.60)", "3x224x224", "Xeon, 2 threads", "Speed only"):
        assert words in text


@pytest.mark.timeout(300)
def test_the_verb_prints_the_table(run):
    command = [
        sys.executable,
        "-m",
        "dpt_search",
        "bench",
        f"dense:{run}",
        str(run),
        "--batch",
        "1",
        "--seconds",
        "0.05",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"1      dense:{run}" in done.stdout
    done = subprocess.run([*command[:4], "timm:nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "timm has no model" in done.stderr
    assert done.stderr.count("\n") == 1
