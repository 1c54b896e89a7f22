"""The stages of a run, in order; each reads and writes the run directory only.

dense -> profile -> rank -> (probe beside) search -> recommend -> refine -> finetune -> baseline -> export -> report
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from dpt_search.config import BadConfig, RunConfig
from dpt_search.costs_table import read_costs, told, write_costs
from dpt_search.decisions import NAME as MEASURED
from dpt_search.decisions import check_units, goals_of
from dpt_search.export_stages import BASELINE, FINETUNE, baseline, export
from dpt_search.hints import prior_surface
from dpt_search.probe_stage import probe
from dpt_search.progress import duration
from dpt_search.recipes import recipe_inputs
from dpt_search.refine import refine
from dpt_search.run import Run, base_task, digest_of, identity_of, read_ranking
from dpt_search.search_stages import chosen_row, recommend_stage, search
from dpt_search.training import clear, train
from search_spaces.plan import PruningPlan
from search_spaces.ratios import RatioSpace
from trainables.locations import fingerprint
from trainables.tasks import AbsorbTask, ProfileTask, RankTask


def dense(run: Run) -> None:
    """Open model and data, adapt the model if asked to, and check its accuracy on val."""

    def work(digest: str) -> None:
        config = run.config
        # Before anything is trained.
        run.call("trainables.devices:check_device", config.device)
        if config.compiled or any(recipe.compile for recipe in (config.adapt, config.trial, config.finetune)):
            run.call("trainables.compiling:check_compiler_of", config.device)
        errors = _absorb(run)
        before = run.task() | {"model": run.unadapted}
        if _recomputes_changing_blocks(config):
            run.call("trainables.recomputing:check_recomputing", type(base_task(run))(**before))
        known = run.call("trainables.dense_check:check_model", type(base_task(run))(**before))
        refused = known.pop("refused")
        for reason in refused:
            run.say(f"not removable: {reason}")
        units = _removable(config, known)
        check_units(config, RatioSpace(len(units["attn"]), len(units["act"])))
        if config.adapt.epochs:
            run.say(f"adapting the dense model for {config.adapt.epochs} epochs")
            train(run, before, PruningPlan(), config.adapt, "dense", digest)
        found = run.call("trainables.dense_check:check_dense", base_task(run))
        warnings = _limits(config, found.pop("carved"))
        for warning in warnings:
            run.say(f"warning: {warning}")
        record = {
            "adapted_epochs": config.adapt.epochs,
            "units": units,
            **({"refused": refused} if refused else {}),
            **({"absorbed": errors} if errors else {}),
            "warnings": warnings,
            "content": _content(config),
        }
        run.store.write_json("dense/dense.json", {**found, **record})

    _check_content(run)
    for location in run.config.prior:
        prior_surface(location, RatioSpace(1, 1))
    run.stage("dense", identity_of(run.config), "dense/dense.json", work)
    clear(run, "dense")
    found = run.store.read_json("dense/dense.json")
    check_units(run.config, RatioSpace(len(found["units"]["attn"]), len(found["units"]["act"])))
    run.say(f"dense accuracy on val {found['accuracy']:.2%} (chance {found['chance']:.1%})")


def _recomputes_changing_blocks(config: RunConfig) -> bool:
    """Say whether activations are recomputed by a training that changes the blocks, as probe and fading do."""
    fading = config.attention == "double" and (
        config.trial.recompute_activations or config.finetune.recompute_activations
    )
    return fading or (config.epochs_of_probe > 0 and config.trial.recompute_activations)


def _absorb(run: Run) -> dict[str, float]:
    """Fit the gates of the dense model's MLPs away, if asked to; return the relative error by MLP."""
    if run.config.model.gated == "keep":
        return {}
    weights = run.store.path("dense/absorbed.safetensors")
    task = AbsorbTask(**run.task() | {"model": run.config.model}, weights=weights)
    errors: dict[str, float] = run.call("trainables.absorb:absorb_gates", task)["errors"]
    listed = ", ".join(f"{path} {error:.2f}" for path, error in errors.items())
    run.say(f"gates absorbed; relative error of the output of each MLP: {listed}")
    return errors


def _removable(config: RunConfig, units: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the units without those that are kept.

    Raises:
        BadConfig: one that is to be kept is not there, or all are.
    """
    kept: dict[str, tuple[int, ...]] = {"attn": config.kept.attn, "act": config.kept.act}
    for kind, indices in kept.items():
        unknown = sorted(set(indices) - set(units[kind]))
        if unknown:
            known = ",".join(map(str, units[kind])) or "none"
            raise BadConfig(f"keep names {kind}:{unknown[0]}, which is no removable unit; the model has {kind}:{known}")
    left = {kind: [i for i in indices if i not in kept[kind]] for kind, indices in units.items()}
    if not any(left.values()):
        raise BadConfig(f"keep is {config.keep!r}, which leaves nothing to remove")
    return left


def _content(config: RunConfig) -> dict[str, str]:
    """Return fingerprints of checkpoint and data: the same path may hold something else later."""
    found = {}
    if config.model.checkpoint not in ("", "pretrained"):
        found["model.checkpoint"] = fingerprint(config.model.checkpoint)
    if config.data.path:
        found["data.path"] = fingerprint(config.data.path)
    return found


def _check_content(run: Run) -> None:
    known = (run.store.read_json("dense/dense.json") or {}).get("content", {})
    for field, content in _content(run.config).items():
        if known.get(field, content) != content:
            raise BadConfig(f"what {field} names has changed since this run began: choose another --run-dir")


def _limits(config: RunConfig, carved: list[str]) -> list[str]:
    """Return what makes the accuracies say less than they seem to."""
    limits = []
    if carved and config.model.checkpoint:
        limits.append(
            f"the data has no {' and no '.join(carved)} split, so it was taken from the training images: accuracies on "
            "it are too good if the dense model was trained on these images"
        )
    if config.adapt.epochs:
        limits.append(
            f"the dense model was adapted to this data for {config.adapt.epochs} epochs only: if more would help it, "
            "trials and the fine-tune gain from training that it lacked, and pruning costs more than it seems to "
            "(--baseline gives the dense model the long fine-tune too)"
        )
    return limits


def profile(run: Run) -> None:
    """Measure MACs, parameters and seconds of every unit on the target device."""
    config = run.config
    if run.store.exists("costs.parquet") and run.store.read_json("stages/profile.json") is None:
        run.say("profile: costs.parquet is there already and is used as it is")
        return

    def work(_: str) -> None:
        task = ProfileTask(
            **run.task(), batches=tuple(config.batches), seconds=config.timing_seconds, compiled=config.compiled
        )
        found = run.call("trainables.profiling:profile", task)
        rows = found.pop("rows")
        # Plans that were timed beside an earlier profile may have been timed in another way.
        run.store.delete(MEASURED)
        write_costs(run.store, found.pop("device"), rows, found)
        if config.compiled:
            run.say(f"compiling took {duration(found['compile_seconds'])}")
        for warning in found["warnings"]:
            run.say(f"warning: {warning}")

    # Runs of versions that could not compile stay as they are.
    inputs = [identity_of(config), config.batches, config.timing_seconds, *(["compiled"] if config.compiled else [])]
    if run.stage("profile", inputs, "costs.parquet", work):
        costs = read_costs(run.store)
        assert costs is not None
        for line in told(costs):
            run.say(line)


def rank(run: Run) -> None:
    """Order the units within each kind, least important first."""

    def work(_: str) -> None:
        told = {"batches": run.config.rank_batches, "method": run.config.ranking, "keep": run.config.keep}
        task = RankTask(**run.task() | told)
        run.store.write_json("ranking.json", run.call("trainables.importance:rank", task))

    if run.stage("rank", identity_of(run.config), "ranking.json", work):
        ranking = read_ranking(run)
        run.say(f"least important first: attn {_listed(ranking.attn)}; act {_listed(ranking.act)}")
    if run.store.exists("costs.parquet"):
        # A budget out of reach is said before anything is trained.
        goals_of(run)


def finetune(run: Run) -> None:
    """Fine-tune the recommended plan for long on all training images."""
    chosen = chosen_row(run)
    config = run.config

    def work(digest: str) -> None:
        # The record of another plan must not stand beside this one's weights.
        run.store.delete(FINETUNE)
        run.say(f"fine-tuning {chosen['plan']} for {config.finetune.epochs} epochs")
        plan = PruningPlan.parse(chosen["plan"])
        result = train(run, run.task(), plan, config.finetune, "finetune", digest)
        run.store.write_json(FINETUNE, {**result, "budget": chosen["budget"], "start": config.start, "inputs": digest})

    run.stage("finetune", _finetune_inputs(run, chosen), FINETUNE, work)
    clear(run, "finetune")


def _finetune_inputs(run: Run, chosen: dict[str, Any]) -> Any:
    weights = run.start_weights
    started = digest_of(run.store.read_json("stages/probe.json")) if weights else ""
    return [chosen["plan"], recipe_inputs(run.config.finetune), identity_of(run.config), started]


def report(run: Run) -> str:
    """Write report.html and its plots; return where it is."""
    from dpt_search.report import write_report

    start = time.monotonic()
    path = write_report(run.store)
    run.store.write_json(
        "stages/report.json",
        {"stage": "report", "inputs": "", "seconds": time.monotonic() - start, "finished_at": time.time()},
    )
    return path


STAGES: dict[str, Callable[[Run], Any]] = {
    "dense": dense,
    "profile": profile,
    "rank": rank,
    "probe": probe,
    "search": search,
    "recommend": recommend_stage,
    "refine": refine,
    "finetune": finetune,
    "baseline": baseline,
    "export": export,
    "report": report,
}
"""Every stage by name, in order."""

WHOLE = tuple(name for name in STAGES if name != "probe")
"""What a whole run does; its search has the probe beside it."""


def trains(run: Run, names: Sequence[str]) -> bool:
    """Say whether any of these stages has long training to do, whose workers have to fit.

    What is there from an earlier start counts as done; whether it is of the same inputs, the stage sees.
    """
    results = {
        "dense": "dense/dense.json" if run.config.adapt.epochs else "",
        "finetune": FINETUNE,
        "baseline": BASELINE if run.config.baseline else "",
    }
    return any(results.get(name) and not run.store.exists(results[name]) for name in names)


def _listed(indices: tuple[int, ...]) -> str:
    return json.dumps(list(indices)).strip("[]")
