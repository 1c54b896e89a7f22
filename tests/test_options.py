"""Where the configuration's values come from: flags, YAML, a run directory, the embedded example."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_config import BASE, read, recorded

from dpt_search.config import BadConfig, RunConfig, check, check_same_run
from dpt_search.options import DESCRIPTIONS, read_config
from dpt_search.store import RunStore
from trainables.settings import DataSettings, ModelSettings, Recipe


def test_the_embedded_example_is_run_when_nothing_is_named() -> None:
    config = read("run")
    assert config.model.checkpoint == "package:dpt_search/embedded/fashion_mnist/dense.safetensors"
    assert config.model.kwargs["depth"] == 12
    assert read("run", "--max-trials", "3") == replace(config, max_trials=3)
    check(config)


def test_the_printed_configuration_is_that_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("run", "--max-trials", "3", "--print-config")
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert read("run", "--config", str(tmp_path / "mine.yaml")) == read("run", "--max-trials", "3")


def test_what_is_printed_of_a_run_directory_is_its_own_wherever_the_flag_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunStore(str(tmp_path)).write_json("run.json", {"config": recorded(replace(BASE, max_trials=77))})
    for argv in (["--print-config", str(tmp_path)], [str(tmp_path), "--print-config"]):
        with pytest.raises(SystemExit):
            read("search", *argv)
        assert "max_trials: 77" in capsys.readouterr().out


def test_a_named_model_has_nothing_of_the_embedded_example() -> None:
    config = read("run", "--model.name", "deit_tiny_patch16_224", "--data.path=cifar10")
    assert config == RunConfig(ModelSettings("deit_tiny_patch16_224"), DataSettings("cifar10"))


def test_flags_go_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {name: m}\ndata: {path: p, subset: 100}\nmax_trials: 5\ntrial: {lr: 2e-3, epochs: 3}\n")
    config = read("run", "--config", str(file), "--trial-epochs=4", "--data.subset", "200", "--max_trials", "6")
    assert config == RunConfig(
        ModelSettings("m"), DataSettings("p", subset=200), max_trials=6, trial=Recipe(lr=2e-3, epochs=4)
    )


def test_a_flag_before_the_yaml_file_counts_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {name: m}\ndata: {path: p}\n")
    assert read("run", "--data.subset=99", f"--config={tmp_path / 'mine.yaml'}").data.subset == 99


@pytest.mark.parametrize("text", ["modle: {name: m}", "model: {nmae: m}", "trial: {epoch: 3}"])
def test_an_unknown_yaml_key_is_refused_by_name_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(BadConfig) as caught:
        read("run", "--config", str(tmp_path / "mine.yaml"))
    assert any(name in str(caught.value) for name in ("modle", "nmae", "epoch"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argument", ["--max-trials=many", "--device=tpu", "--seed=1.5", "--model.kwargs=3"])
def test_a_value_of_the_wrong_type_names_its_flag_as_it_is_typed(argument: str) -> None:
    with pytest.raises(BadConfig) as caught:
        read("run", argument)
    flag, _, value = argument.partition("=")
    assert flag in str(caught.value)
    assert value in str(caught.value)
    assert "class" not in str(caught.value)


def test_a_run_directorys_own_configuration_is_what_flags_go_over(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    odd = DataSettings("a b/{c}: [d]", image_column="null", label_column="1e5", mean=[0.1 + 0.2], cache_dir="~/#x")
    mine = replace(BASE, data=odd, seed=7, timing_batches=[8], adapt=Recipe(epochs=0, lr=1 / 3), run_dir="elsewhere")
    store.write_json("run.json", {"config": asdict(mine)})
    again = replace(mine, run_dir=store.location)
    assert read("run", "--run-dir", store.location) == again
    assert read("run", f"--run-dir={store.location}", "--max-trials=20") == replace(again, max_trials=20)
    for verb in (name for name in DESCRIPTIONS if name != "run"):
        assert read(verb, store.location) == again
    check_same_run(recorded(mine), again)


@pytest.mark.parametrize(
    "order", [["--max-trials", "20", "RUN"], ["RUN", "--max-trials=20"], ["--max-trials=20", "RUN"]]
)
def test_options_may_stand_before_and_after_the_run_directory(tmp_path: Path, order: list[str]) -> None:
    store = RunStore(str(tmp_path / "run"))
    store.write_json("run.json", {"config": asdict(BASE)})
    argv = [store.location if argument == "RUN" else argument for argument in order]
    assert read("search", *argv) == replace(BASE, run_dir=store.location, max_trials=20)


def test_reading_a_configuration_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read("run", "--run-dir", "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--baseline"], ["--baseline", "true"], ["--baseline=true"]])
def test_a_baseline_needs_no_value_and_stands_anywhere(tmp_path: Path, flags: list[str]) -> None:
    RunStore(str(tmp_path)).write_json("run.json", {"config": asdict(replace(BASE, run_dir=str(tmp_path)))})
    for order in ([*flags, str(tmp_path)], [str(tmp_path), *flags], [str(tmp_path), *flags, "--max-trials", "3"]):
        assert read_config("export", order) == replace(
            BASE, run_dir=str(tmp_path), baseline=True, max_trials=3 if "3" in order else BASE.max_trials
        )
    assert not read_config("export", [str(tmp_path), "--baseline", "false"]).baseline


@pytest.mark.parametrize(("flags", "compiled"), [(["--compiled"], True), (["--compiled", "false"], False), ([], False)])
def test_compiling_is_a_switch(tmp_path: Path, flags: list[str], compiled: bool) -> None:
    assert read_config("run", ["--run-dir", str(tmp_path), *flags, "--seed", "3"]).compiled is compiled
