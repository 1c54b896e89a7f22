"""The configuration of a run: one frozen dataclass, checked at once, recorded in run.json.

Identity fields say what the run is about: with another value it would be another run, so a change is refused. The
others may grow: more trials, other budgets, more workers, a longer fine-tune go on from what is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dpt_search.recipes import LATER_IN_RECIPES, adapt_recipe, finetune_recipe, worker_range, wrong_with
from search_spaces import BadInput
from search_spaces.budgets import Budget, parse_budgets
from search_spaces.plan import Attention, PruningPlan
from trainables.devices import DeviceName
from trainables.settings import DataSettings, ModelSettings, Recipe
from trainables.tasks import FORMATS

SAMPLER_NAMES = ("map", "tpe", "gp", "cmaes", "qmc", "random", "grid")


class BadConfig(BadInput):
    """The configuration cannot be used; the message names the field and says what to do."""


@dataclass(frozen=True)
class RunConfig:
    """All that a run depends on."""

    model: ModelSettings = field(default_factory=ModelSettings)
    """The dense model."""
    data: DataSettings = field(default_factory=DataSettings)
    """Images and labels."""
    run_dir: str = "runs/default"
    """Directory of the run: a path or a pyarrow.fs URI (s3://, gs://, hdfs://)."""
    seed: int = 0
    """Fixes splits, subset, order, trials and sampler."""
    device: DeviceName = "cpu"
    """Where models run."""
    budget: str = "units=4,6,8,10"
    """What results must reach: units=8 removed; speedup=1.5 at batch 64, speedup@1=1.3 at batch 1; macs=0.6 or
    params=40M left, up to 1 as a share of the dense model's. Several at once: "units=4,6 speedup=1.3,1.5"."""
    finetune_budget: str = ""
    """The budget whose recommendation is fine-tuned and exported; empty: the last, of one quantity the strictest."""
    max_attn: int | None = None
    """Remove at most this many attentions; left out: any number."""
    max_act: int | None = None
    """Remove at most this many activations; left out: any number."""
    keep: str = ""
    """Units that are never removed, such as "attn:0,11 act:0"; pruning ratios count the others only."""
    attention: Attention = "zero"
    """What stays of a removed attention: zero, nothing; identity, x + norm(x); double, 2 x, reached by a decay."""
    adapt: Recipe = field(default_factory=adapt_recipe)
    """How the dense model is adapted to the data first; adapt.epochs=0 (--adapt-epochs) leaves it as it is."""
    ranking: Literal["taylor", "conditional"] = "taylor"
    """How units are ordered: taylor, in one pass; conditional, the rest anew after every removal, a pass per unit."""
    rank_batches: int = 16
    """Batches of 64 images that the ranking looks at in a pass."""
    timing_batches: list[int] = field(default_factory=lambda: [1, 64])
    """Batch sizes at which speed is measured."""
    timing_seconds: float = 10.0
    """Time the profile takes for its measurements, at most."""
    compiled: bool = False
    """Measure speed, here, near limits and at the end, of models as torch.compile makes them; needs a compiler."""
    sampler: Literal["map", "tpe", "gp", "cmaes", "qmc", "random", "grid"] = "map"
    """Who proposes trials: map is this product's own, the others are Optuna's."""
    probe_epochs: int | None = None
    """Epochs of the elastic probe, which gives every cell a cheap accuracy beside the first trials; 0 leaves it out,
    null is as many as a trial's."""
    probe_lr: float = 0.0
    """Peak learning rate of the probe at batch size 512; 0: that of a trial."""
    probe_draw: Literal["uniform", "line"] = "uniform"
    """What the probe trains on: uniform, all cells alike; line, the budgets alike, and the cells of each."""
    probe_sandwich: bool = False
    """Train every batch of the probe as the dense model and as a smallest one too, at three times the cost."""
    probe_cells: int = 16
    """Cells up to the budgets' to evaluate with the probe's weights, well spread; others follow smoothly. 0: all."""
    probe_max_cost: float = 3.0
    """Leave the probe out of a search where it would cost more trials of the dense model than this; 0: never."""
    prior: list[str] = field(default_factory=list)
    """Directories of earlier runs whose surfaces hint at this one's; how far is learnt. Repeatable: --prior+=RUN."""
    start: Literal["dense", "probe"] = "dense"
    """Weights that trials and the long fine-tune start from: the dense model's, or the probe's."""
    design: Literal["lines", "walk", "interleaved"] = "lines"
    """What the sampler map tries first: lines, the middle cell of the middle budget; or a published walk."""
    trial: Recipe = field(default_factory=Recipe)
    """The short fine-tune of a trial."""
    max_trials: int = 12
    """Number of trials in all, those of earlier starts counted."""
    max_hours: float = 0.0
    """Stop proposing trials this long after a start; 0: no limit."""
    trial_timeout: float = 0.0
    """Fail a trial that takes more seconds than this, looked at after every epoch; 0: no limit."""
    max_concurrent: int = 0
    """Trials at a time; 0: what the cluster holds, at most a tenth of the feasible cells, or two."""
    max_failures: int = 5
    """Stop the search after this many failed trials in a row."""
    cpus_per_trial: int = 1
    """CPU cores, and threads, of one trial."""
    devices_per_trial: float = 1.0
    """Accelerators of one trial; a fraction shares one."""
    refine: int = 0
    """Swaps of one unit to try on the plan that is fine-tuned, each a trial; 0 leaves it as it is."""
    finetune: Recipe = field(default_factory=finetune_recipe)
    """The long fine-tune of the winner."""
    finetune_workers: int | str = 1
    """Workers of the long fine-tune, which share every batch; 1..4: as many of 4 as there are, and on with fewer."""
    recipe: Literal["", "hetdpt", "deit", "short"] = ""
    """What the long fine-tune's fields (finetune.*) are where they are not given; empty: the defaults below."""
    checkpoint_every: int = 1
    """Write a state of the long fine-tune no oftener than after so many epochs."""
    checkpoint_seconds: float = 60.0
    """Write a state of the long fine-tune no oftener than every so many seconds."""
    checkpoints: int = 1
    """States of the long fine-tune to keep, the newest ones."""
    baseline: bool = False
    """Give the dense model the long fine-tune too, at its cost: what is lost against that is lost by pruning alone."""
    export_formats: str = ",".join(FORMATS)
    """What the merged model is written as: pt2 (torch.export) and onnx load without this package."""

    @property
    def epochs_of_probe(self) -> int:
        """Epochs of the elastic probe; 0 without one."""
        return self.trial.epochs if self.probe_epochs is None else self.probe_epochs

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets asked for, those of one quantity from the mildest on."""
        return parse_budgets(self.budget)

    @property
    def chosen_budget(self) -> Budget:
        """The budget whose recommendation is fine-tuned."""
        return parse_budgets(self.finetune_budget)[0] if self.finetune_budget else self.budgets[-1]

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most workers of the long fine-tune."""
        return worker_range(self.finetune_workers)

    @property
    def kept(self) -> PruningPlan:
        """The units that are never removed."""
        return PruningPlan.parse(self.keep)

    @property
    def limits(self) -> dict[str, int]:
        """The most units that may go, of the kinds that have such a limit."""
        return {kind: most for kind, most in (("attn", self.max_attn), ("act", self.max_act)) if most is not None}

    @property
    def batches(self) -> list[int]:
        """Batch sizes at which speed is measured: those asked for, and those of the budgets."""
        wanted = (budget.batch for budget in self.budgets if budget.batch)
        return list(dict.fromkeys([*self.timing_batches, *wanted]))

    @property
    def formats(self) -> tuple[str, ...]:
        """The export formats asked for, in the order of `FORMATS`, and those that there are not."""
        asked = [name.strip() for name in self.export_formats.split(",")]
        return (*(name for name in FORMATS if name in asked), *(name for name in asked if name not in FORMATS))


_GROWING = (
    "run_dir", "budget", "finetune_budget", "max_trials", "max_hours", "trial_timeout", "max_concurrent",
    "max_failures", "cpus_per_trial", "devices_per_trial", "finetune.", "finetune_workers", "data.cache_dir",
    "data.workers", "data.root", "data.stream", "timing_batches", "timing_seconds", "compiled", "sampler", "design",
    "probe_", "refine", "prior", "max_attn", "max_act", "baseline", "export_formats", "recipe", "checkpoint",
)  # fmt: skip
"""Fields, or groups of them, that a later start may change."""

LATER = {
    "ranking": "taylor", "start": "dense", "keep": "", "attention": "zero", "model.gated": "keep",
    **{f"{recipe}.{name}": value for recipe in ("adapt", "trial") for name, value in LATER_IN_RECIPES.items()},
}  # fmt: skip
"""Identity fields that earlier versions lacked, and what those versions did: with it, their records stay valid."""


def check(config: RunConfig) -> None:
    """Refuse what can be seen to be wrong without opening anything.

    Raises:
        BadConfig: a field's value makes no sense.
    """
    if not config.model.name:
        raise BadConfig("model.name is missing: name a timm model, such as --model.name deit_small_patch16_224")
    if bool(config.data.path) == bool(config.data.factory):
        raise BadConfig("give either data.path or data.factory")
    try:
        if config.chosen_budget not in config.budgets:
            raise BadConfig(
                f"finetune_budget {config.finetune_budget!r} is not one of budget {config.budget!r}: name one "
                "of them, or leave it empty for the last"
            )
        _ = config.kept, config.workers
    except BadConfig:
        raise
    except ValueError as error:
        raise BadConfig(str(error)) from None
    _check_numbers(config)
    if any(batch < 1 for batch in config.timing_batches) or not config.timing_batches:
        raise BadConfig("timing_batches needs at least one batch size, each at least 1")
    if config.start == "probe" and not config.epochs_of_probe:
        raise BadConfig("start is 'probe', but probe_epochs is 0: there would be no weights to start from")
    if config.model.new_head and not config.adapt.epochs:
        raise BadConfig("model.new_head starts an untrained classifier: train it first with --adapt-epochs")
    if "safetensors" not in config.formats or not set(config.formats) <= set(FORMATS):
        raise BadConfig(
            f"export_formats is {config.export_formats!r}: name safetensors, which is always written, and "
            f"any of {', '.join(FORMATS)}, separated by commas"
        )
    _check_recipes(config)


def _check_recipes(config: RunConfig) -> None:
    for name in ("adapt", "trial", "finetune"):
        recipe: Recipe = getattr(config, name)
        if not recipe.epochs:
            continue
        if wrong := wrong_with(recipe, 1 if name == "trial" else config.workers[1], config.attention):
            raise BadConfig(f"{name}.{wrong}")
        if config.data.subset and name == "trial" and config.data.subset < recipe.batch_size:
            raise BadConfig(
                f"data.subset ({config.data.subset}) is smaller than trial.batch_size ({recipe.batch_size})"
            )


def _check_numbers(config: RunConfig) -> None:
    for name, value in _flat(asdict(config)).items():
        if not isinstance(value, int | float):
            continue
        if not value >= (low := _LOWEST.get(name, 0)):
            raise BadConfig(f"{name} is {value}, but must be at least {low}")
        if name.rpartition(".")[2] in _SHARES and value > 1:
            raise BadConfig(f"{name} is {value}, but must be at most 1")


_LOWEST: dict[str, float] = {
    "devices_per_trial": 0.01,
    **dict.fromkeys(("max_trials", "max_failures", "cpus_per_trial", "rank_batches"), 1),
    **dict.fromkeys(("checkpoint_every", "checkpoints"), 1),
    **{f"{recipe}.epochs": 1 for recipe in ("trial", "finetune")},
    **{f"{recipe}.batch_size": 1 for recipe in ("adapt", "trial", "finetune")},
    **{f"{recipe}.repeated_augmentation": 1 for recipe in ("adapt", "trial", "finetune")},
    **{f"{recipe}.temperature": 0.01 for recipe in ("adapt", "trial", "finetune")},
}
"""Smallest values; of a number that is not here, 0."""

_SHARES = ("label_smoothing", "drop_path", "ema", "distillation_alpha", "random_erasing", "crop_scale", "hflip")
"""Fields of a recipe that are probabilities or weights."""


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the fields that say what the run is about, by dotted name; the probe's too where trials start from it."""
    probe = config.start == "probe"
    # What the shared weights are trained on.
    lines = probe and (config.probe_draw == "line" or config.probe_sandwich)
    return {
        name: value
        for name, value in {**_flat(asdict(config)), "probe_epochs": config.epochs_of_probe}.items()
        if not name.startswith(_GROWING)
        or (probe and name.startswith("probe_") and name not in ("probe_cells", "probe_max_cost"))
        or (lines and name in ("budget", "max_attn", "max_act"))
    }


def check_same_run(recorded: dict[str, Any], config: RunConfig) -> None:
    """Refuse a configuration that is about something else than the run directory's.

    Args:
        recorded: the configuration in run.json, as plain data.
        config: the configuration of this start.

    Raises:
        BadConfig: an identity field differs, naming it.
    """
    before = {**LATER, **_flat(recorded)}
    if before.get("probe_epochs", 0) is None:  # as many as a trial's
        before["probe_epochs"] = before["trial.epochs"]
    for name, value in identity(config).items():
        if name in before and before[name] != value:
            raise BadConfig(
                f"{name} is {value!r}, but the run in {config.run_dir!r} was started with {before[name]!r}: "
                "keep it, or choose another --run-dir"
            )


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    return dict(_items(nested, ""))


def _items(nested: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        # model.kwargs is the user's own mapping: one value.
        if isinstance(value, dict) and name != "kwargs":
            yield from _items(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
