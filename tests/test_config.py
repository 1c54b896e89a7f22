"""The configuration: which values are refused, and which may change between two starts."""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import pytest

from dpt_search.config import BadConfig, RunConfig, check, check_same_run, identity
from dpt_search.options import read_config
from dpt_search.run import identity_of
from trainables.settings import DataSettings, ModelSettings, Recipe

BASE = RunConfig(ModelSettings("vit_tiny_patch16_224"), DataSettings("cifar10"), run_dir="runs/one")
MAY_GROW = {
    "run_dir", "budget", "finetune_budget", "max_trials", "max_hours", "trial_timeout", "max_concurrent",
    "max_failures", "cpus_per_trial", "devices_per_trial", "finetune_workers", "data.cache_dir", "data.workers",
    "data.root", "data.stream", "timing_batches", "timing_seconds", "compiled", "sampler", "design", "probe_epochs",
    "probe_lr", "probe_draw", "probe_sandwich", "probe_cells", "probe_max_cost", "refine", "prior", "max_attn",
    "max_act", "baseline", "export_formats", "recipe", "checkpoint_every", "checkpoint_seconds", "checkpoints",
    *(f"finetune.{f.name}" for f in fields(Recipe)),
}  # fmt: skip
AT_LEAST = {
    "max_trials": 1, "max_failures": 1, "cpus_per_trial": 1, "devices_per_trial": 0.01, "checkpoint_every": 1,
    "checkpoints": 1, "trial.repeated_augmentation": 1, "finetune.repeated_augmentation": 1,
    "adapt.repeated_augmentation": 1,
    "rank_batches": 1, "trial.epochs": 1, "finetune.epochs": 1, "trial.batch_size": 1, "finetune.batch_size": 1,
    "adapt.batch_size": 1, "trial.temperature": 0.01, "finetune.temperature": 0.01, "adapt.temperature": 0.01,
}  # fmt: skip
"""Every other number may be 0 and no less."""
AT_MOST_1 = ("label_smoothing", "drop_path", "ema", "distillation_alpha", "random_erasing", "crop_scale", "hflip")


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(value):
        name, inner = prefix + field.name, getattr(value, field.name)
        if is_dataclass(inner):
            yield from flat(inner, f"{name}.")
        else:
            yield name, inner


FIELDS = dict(flat(BASE))
NUMBERS = [
    name
    for name, value in FIELDS.items()
    if isinstance(value, int | float) and not isinstance(value, bool) and name != "finetune_workers"
]


def changed(config: RunConfig, name: str, value: Any) -> RunConfig:
    group, _, inner = name.rpartition(".")
    return replace(config, **{group: replace(getattr(config, group), **{inner: value})} if group else {name: value})


def other_value(name: str, value: Any) -> Any:
    choices = {"device": "cuda", "sampler": "tpe", "design": "walk", "ranking": "conditional"}
    if name in choices:
        return choices[name]
    if isinstance(value, bool):
        return not value
    if value is None:
        return 3
    if name == "keep":
        return "attn:0"
    if isinstance(value, int | float):
        return value + 1
    return {str: f"{value}x", list: [*value, 7] if isinstance(value, list) else 0, dict: {"depth": 3}}[type(value)]


def recorded(config: RunConfig) -> Any:
    """Return a configuration as run.json has it."""
    return json.loads(json.dumps(asdict(config)))


def read(verb: str, *argv: str) -> RunConfig:
    return read_config(verb, list(argv))


def refusal(config: RunConfig) -> str:
    with pytest.raises(BadConfig) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_are_identity_fields_and_growing_ones() -> None:
    assert FIELDS.keys() > MAY_GROW
    assert {"model.name", "data.path", "seed", "trial.epochs", "adapt.epochs"} <= FIELDS.keys() - MAY_GROW


@pytest.mark.parametrize("name", FIELDS)
def test_a_changed_field_goes_on_or_is_refused_by_name(name: str) -> None:
    now = changed(BASE, name, other_value(name, FIELDS[name]))
    assert now != BASE
    if name in MAY_GROW:
        check_same_run(recorded(BASE), now)
        return
    with pytest.raises(BadConfig) as caught:
        check_same_run(recorded(BASE), now)
    message = str(caught.value)
    assert message.startswith(f"{name} is ")
    assert "--run-dir" in message
    assert repr(FIELDS[name]) in message
    assert "\n" not in message


def test_the_same_configuration_goes_on() -> None:
    check_same_run(recorded(BASE), BASE)


def test_a_field_that_an_older_version_did_not_record_is_no_change() -> None:
    old = recorded(BASE)
    del old["rank_batches"], old["trial"]["temperature"], old["data"]
    check_same_run(old, BASE)


def test_a_field_that_came_later_leaves_the_records_of_earlier_versions_valid() -> None:
    assert identity(BASE)["ranking"] == "taylor"
    assert "ranking" not in identity_of(BASE)
    other = replace(BASE, ranking="conditional", attention="double")
    assert identity_of(other) == identity_of(BASE) | {"ranking": "conditional", "attention": "double"}


def test_a_run_of_an_earlier_version_keeps_what_that_version_did() -> None:
    old = recorded(BASE)
    del old["attention"]
    check_same_run(old, replace(BASE, attention="zero"))
    with pytest.raises(BadConfig, match=r"attention is 'double', but the run in .* was started with 'zero'"):
        check_same_run(old, replace(BASE, attention="double"))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_below_its_lowest_value_is_refused_by_name(name: str) -> None:
    low = AT_LEAST.get(name, 0)
    check(changed(replace(BASE, finetune_workers=1), name, low))
    for value in (low - 0.005 if isinstance(FIELDS[name], float) else low - 1, float("nan")):
        message = refusal(changed(BASE, name, value))
        assert message == f"{name} is {value}, but must be at least {low}"


@pytest.mark.parametrize(
    "name", [f"{recipe}.{name}" for recipe in ("adapt", "trial", "finetune") for name in AT_MOST_1]
)
def test_a_share_above_one_is_refused_by_name(name: str) -> None:
    check(changed(BASE, name, 1.0))
    assert refusal(changed(BASE, name, 1.5)) == f"{name} is 1.5, but must be at most 1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.name": ""}, "model.name is missing"),
        ({"data.path": ""}, "either data.path or data.factory"),
        ({"data.factory": "my.factory"}, "either data.path or data.factory"),
        ({"budget": "speed"}, "unknown budget 'speed'"),
        ({"budget": "units=four"}, "cannot read budget 'units=four'"),
        ({"budget": "units=-4"}, "cannot be negative"),
        ({"finetune_budget": "units=7"}, "finetune_budget 'units=7' is not one of budget"),
        ({"finetune_budget": "most"}, "unknown budget 'most'"),
        ({"budget": "units=4 speedup=1.5", "finetune_budget": "speedup@1=1.5"}, "is not one of budget"),
        ({"max_attn": -1}, "max_attn is -1, but must be at least 0"),
        ({"keep": "attn:x"}, "cannot read the plan 'attn:x'"),
        ({"timing_batches": []}, "timing_batches needs"),
        ({"timing_batches": [1, 0]}, "timing_batches needs"),
        ({"model.new_head": True}, "--adapt-epochs"),
        ({"trial.mixup": 0.2, "trial.batch_size": 33}, "trial.batch_size must be even"),
        ({"finetune.cutmix": 0.2, "finetune.batch_size": 33}, "finetune.batch_size must be even"),
        ({"data.subset": 63}, "data.subset (63) is smaller than trial.batch_size (64)"),
        ({"finetune_workers": 65}, "finetune.batch_size (64) is too small for 65 workers"),
        (
            {"finetune_workers": "2..33", "finetune.mixup": 0.5},
            "finetune.batch_size (64) is too small for 33 workers, ",
        ),
        ({"finetune_workers": 0}, "finetune_workers is 0: give a number of at least 1, or a range such as 1..4"),
        ({"finetune_workers": "4..2"}, "finetune_workers is '4..2': give a number of at least 1, or a range"),
        ({"finetune_workers": "many"}, "finetune_workers is 'many': give a number of at least 1, or a range"),
        ({"finetune_workers": "-1..2"}, "finetune_workers is '-1..2': give a number of at least 1, or a range"),
        ({"finetune.betas": [0.9]}, "finetune.betas is [0.9]: give two numbers from 0 to below 1"),
        ({"trial.betas": [0.9, 1.0]}, "trial.betas is [0.9, 1.0]: give two numbers from 0 to below 1"),
        ({"trial.compile": True, "attention": "double"}, "trial.compile cannot be had with --attention double"),
    ],
)
def test_values_that_make_no_sense_together_are_refused(values: dict[str, Any], message: str) -> None:
    config = BASE
    for name, value in values.items():
        config = changed(config, name, value)
    assert message in refusal(config)


@pytest.mark.parametrize(
    "values", [{"data.path": "", "data.factory": "a.b"}, {"data.subset": 0}, {"finetune_workers": 3}, {"seed": 5}]
)
def test_values_that_make_sense_are_accepted(values: dict[str, Any]) -> None:
    config = BASE
    for name, value in values.items():
        config = changed(config, name, value)
    check(config)


def test_the_largest_budget_is_fine_tuned_unless_another_is_chosen() -> None:
    assert str(replace(BASE, budget="units=4,10,6").chosen_budget) == "units=10"
    assert str(replace(BASE, budget="units=4,10,6", finetune_budget="units=6").chosen_budget) == "units=6"
    assert str(replace(BASE, budget="speedup=1.5,1.3 macs=0.6,0.8").chosen_budget) == "macs=0.6"
    assert str(replace(BASE, budget="macs=0.6 speedup=1.5", finetune_budget="speedup@64=1.50").chosen_budget) == (
        "speedup=1.5"
    )


def test_speed_is_measured_at_the_batch_sizes_of_the_budgets_too() -> None:
    assert replace(BASE, budget="units=4 macs=0.6").batches == [1, 64]
    assert replace(BASE, budget="speedup@8=1.5 speedup=1.2", timing_batches=[32]).batches == [32, 8, 64]


def test_what_came_later_leaves_the_identity_of_earlier_runs_alone() -> None:
    assert not {"keep", "max_attn", "max_act"} & identity_of(BASE).keys()
    assert identity_of(replace(BASE, keep="attn:0"))["keep"] == "attn:0"


@pytest.mark.parametrize(("given", "workers"), [("2", (2, 2)), ("1..4", (1, 4)), ("3..3", (3, 3)), ("12", (12, 12))])
def test_workers_are_a_number_or_a_range(given: str, workers: tuple[int, int]) -> None:
    config = read("run", f"--finetune-workers={given}", "--finetune.batch_size=64")
    assert config.workers == workers
    check(config)


def test_what_the_shared_weights_are_trained_on_may_not_change_under_trials_that_start_from_them() -> None:
    drawn = replace(BASE, start="probe", probe_draw="line")
    for now in (replace(drawn, budget="units=2"), replace(drawn, probe_lr=0.5)):
        with pytest.raises(BadConfig):
            check_same_run(asdict(drawn), now)
    uniform = replace(BASE, start="probe")
    check_same_run(asdict(uniform), replace(uniform, budget="units=2", probe_cells=7))


def test_formats_are_written_in_their_own_order_and_others_are_refused() -> None:
    assert replace(BASE, export_formats="onnx, safetensors").formats == ("safetensors", "onnx")
    for text in ("pt2,onnx", "safetensors,tflite", ""):
        with pytest.raises(BadConfig, match="export_formats"):
            check(replace(BASE, export_formats=text))
