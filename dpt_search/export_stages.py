"""The stages after the long fine-tune: the same for the dense model, if asked for, and the export."""

from __future__ import annotations

from typing import Any

from dpt_search.costs_table import read_costs
from dpt_search.recipes import recipe_inputs
from dpt_search.run import Run, digest_of, identity_of
from dpt_search.store import BadRun
from dpt_search.training import clear, train
from dpt_search.verdict import verdict
from search_spaces.plan import PruningPlan
from trainables.tasks import FORMATS, ExportTask

FINETUNE = "finetune/finetune.json"
BASELINE = "baseline/baseline.json"


def baseline(run: Run) -> None:
    """Give the dense model the long fine-tune too, so that extra training is not taken for what pruning does."""
    config = run.config
    if not config.baseline:
        return

    def work(digest: str) -> None:
        run.store.delete(BASELINE)
        run.say(f"fine-tuning the dense model for {config.finetune.epochs} epochs too")
        result = train(run, run.task(), PruningPlan(), config.finetune, "baseline", digest)
        run.store.write_json(BASELINE, {**result, "inputs": digest})

    run.stage("baseline", _baseline_inputs(run), BASELINE, work)
    clear(run, "baseline")


def _baseline_inputs(run: Run) -> Any:
    return ["dense", recipe_inputs(run.config.finetune), identity_of(run.config)]


def _baseline_weights(run: Run) -> tuple[str, str]:
    """Return where the baseline's weights are and the digest they were made from; empty where none was asked for.

    Raises:
        BadRun: it was asked for and is not there, or is of another recipe.
    """
    if not run.config.baseline:
        return "", ""
    found, digest = run.store.read_json(BASELINE), digest_of(_baseline_inputs(run))
    if found is None or found["inputs"] != digest:
        raise BadRun(f"no baseline of this fine-tune in {run.store.location!r}: run `dpt-search baseline` on it first")
    return run.store.path("baseline/model.safetensors"), digest


def export(run: Run) -> None:
    """Merge, reload, compare, test once and time the fine-tuned model."""
    found = run.store.read_json(FINETUNE)
    if found is None:
        raise BadRun(f"nothing fine-tuned in {run.store.location!r} yet: run `dpt-search finetune` on it first")
    formats, (weights, digest) = run.config.formats, _baseline_weights(run)
    costs = read_costs(run.store)
    # The budget was met by the profile's models: its verdict is by the same.
    compiled = costs is not None and costs.compiled

    def work(_: str) -> None:
        # What an earlier export left is of another model, or not asked for any more.
        for name in ("summary.json", "model.onnx.data", *FORMATS.values()):
            run.store.delete(f"export/{name}")
        task = ExportTask(
            **run.task(),
            plan=found["plan"],
            weights=run.store.path("finetune/model.safetensors"),
            folder=run.store.path("export"),
            batches=tuple(run.config.batches),
            formats=formats,
            baseline=weights,
            compiled=compiled,
        )
        summary = run.call("trainables.export:export", task)
        told = verdict(found["budget"], summary)
        run.store.write_json("export/summary.json", {**summary, "budget": found["budget"], "verdict": told})
        run.say(told["text"])
        run.say(f"merged and unmerged logits differ by {summary['largest_logit_difference']:.1e} of the largest")

    inputs = [found["inputs"], found["plan"], run.config.batches, formats, digest, *(["compiled"] if compiled else [])]
    run.stage("export", inputs, "export/summary.json", work)
