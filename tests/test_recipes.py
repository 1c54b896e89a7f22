"""Recipes: the presets of the long fine-tune, what goes over them, and fields that came later."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from test_config import BASE, read

from dpt_search.config import BadConfig, check
from dpt_search.recipes import LATER_IN_RECIPES, PRESETS, recipe_inputs
from dpt_search.run import identity_of
from dpt_search.store import RunStore
from trainables.settings import Recipe


def test_fields_that_recipes_lacked_leave_earlier_runs_alone_where_they_are_what_those_did() -> None:
    assert set(recipe_inputs(BASE.finetune)) == {f.name for f in fields(Recipe)} - LATER_IN_RECIPES.keys()
    assert not [name for name in identity_of(BASE) if name.rpartition(".")[2] in LATER_IN_RECIPES]
    other = replace(BASE, trial=Recipe(betas=[0.9, 0.99]), finetune=Recipe(compile=True))
    assert identity_of(other) == identity_of(BASE) | {"trial.betas": [0.9, 0.99]}
    assert recipe_inputs(other.finetune)["compile"] is True
    for name, value in LATER_IN_RECIPES.items():
        assert getattr(Recipe(), name) == value


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_is_what_the_long_fine_tune_has_where_nothing_else_is_said(tmp_path: Path, name: str) -> None:
    expected = Recipe(**PRESETS[name])
    for argv in (
        ["--recipe", name],
        [f"--recipe={name}", "--max-trials", "3"],
        ["--model.name=m", "--data.path=p", "--recipe", name],
    ):
        config = read("run", *argv)
        assert config.finetune == expected
        check(config)
    assert read("run").trial == read("run", "--recipe", name).trial
    assert read("run", "--finetune-epochs", "7", "--recipe", name, "--finetune.mixup=0.3").finetune == replace(
        expected, epochs=7, mixup=0.3
    )
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: {{name: m}}\ndata: {{path: p}}\nrecipe: {name}\nfinetune: {{lr: 0.5}}\n")
    assert read("run", "--config", str(file)).finetune == replace(expected, lr=0.5)
    assert read("run", "--config", str(file), "--finetune.epochs", "9").finetune == replace(expected, lr=0.5, epochs=9)
    other = "deit" if name == "short" else "short"
    assert read("run", "--config", str(file), "--recipe", other).finetune == Recipe(**PRESETS[other])
    # A flag goes over the preset wherever it stands.
    told = read("run", "--finetune.epochs", "20", "--config", str(file), "--recipe", other)
    assert told.finetune.epochs == 20


def test_a_recipe_goes_over_what_a_run_directory_has_and_stays(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    store.write_json("run.json", {"config": asdict(replace(BASE, finetune=Recipe(epochs=77, lr=0.1)))})
    now = read("finetune", store.location, "--recipe", "deit", "--finetune.lr", "0.2")
    assert now.finetune == replace(Recipe(**PRESETS["deit"]), lr=0.2)
    store.write_json("run.json", {"config": asdict(now)})
    assert read("finetune", store.location) == now
    with pytest.raises(BadConfig, match="--recipe"):
        read("run", "--recipe", "best")


def test_the_published_recipe_is_the_published_one() -> None:
    hetdpt = read("run", "--recipe", "hetdpt").finetune
    assert (hetdpt.epochs, hetdpt.lr, hetdpt.min_lr, hetdpt.weight_decay, hetdpt.warmup_epochs) == (
        400, 5e-5, 1e-5, 0.08, 10
    )  # fmt: skip
    assert (hetdpt.mixup, hetdpt.cutmix, hetdpt.label_smoothing, hetdpt.drop_path) == (0.8, 1.0, 0.1, 0.1)
    assert (hetdpt.ema, hetdpt.distillation, hetdpt.distillation_alpha) == (0.99996, "hard", 0.5)
    assert "rand-m9" in hetdpt.auto_augment
