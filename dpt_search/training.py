"""The long fine-tune on Ray Train workers, as the stages dense, finetune and baseline use it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from dpt_search.progress import EpochLines
from dpt_search.remote import StageFailed
from dpt_search.run import Run
from search_spaces.plan import PruningPlan
from trainables.settings import Recipe
from trainables.tasks import FinetuneTask

COORDINATOR = 0.01
"""Share of a worker's CPUs and accelerator that goes to what coordinates all workers. It imports torch, so it has to
run on a node that has the device; if nothing were taken off the workers for it, they could take all there is."""


def train(
    run: Run, told: dict[str, Any], plan: PruningPlan, recipe: Recipe, folder: str, digest: str
) -> dict[str, Any]:
    """Train a plan on all training images, going on from the newest epoch that is there.

    Args:
        run: the run.
        told: what every stage on a worker is told.
        plan: what is removed first.
        recipe: how to train.
        folder: where in the run directory state, progress and weights go.
        digest: of all that the result depends on.

    Returns:
        What `long_finetune.finetune` does.
    """
    run.start_ray()
    _keep_requests_on_head()
    config, (fewest, most) = run.config, _workers(run)
    known = run.store.read_json(f"{folder}/progress.json")
    if known is None or known["inputs"] != digest:
        # Of another training.
        clear(run, folder)
    task = FinetuneTask(
        **told | {"threads": config.cpus_per_trial},
        recipe=recipe, plan=str(plan), folder=run.store.path(folder), inputs=digest, workers=most, fewest=fewest,
        start=run.start_weights if plan.units else "", checkpoint_every=config.checkpoint_every,
        checkpoint_seconds=config.checkpoint_seconds, checkpoints=config.checkpoints,
    )  # fmt: skip
    lines = EpochLines(run.say, run.store, f"{folder}/progress.json", digest, recipe.epochs)
    each = {name: amount - COORDINATOR for name, amount in run.finetune_resources.items()}
    while True:
        before = lines.done()
        try:
            result: dict[str, Any] = run.call(
                "trainables.long_finetune:train_with_ray", task, each, cpus=COORDINATOR, devices=COORDINATOR,
                on_wait=lines.show, waits_for=each,
            )  # fmt: skip
        except StageFailed as error:
            # Ray Train allows a few lost workers in all; here as many as it takes, as long as states come between.
            if lines.done() <= before:
                raise
            reason = str(error).strip().splitlines()[-1]
            run.say(f"the workers ended ({reason}); going on after epoch {lines.done()}")
            continue
        lines.show()
        return result


def _keep_requests_on_head() -> None:
    """Have Ray Train's requests to the autoscaler kept on the head, which is not paid for longer on their account."""
    import ray

    from dpt_search.remote import call_on, is_cluster

    if is_cluster():
        head = [
            node["NodeID"] for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]
        ]
        # Without it the run is as good; a node may stay for longer than it is of use.
        with suppress(StageFailed):
            call_on("trainables.train_requests:keep_here", dict.fromkeys(head, ()))


def _workers(run: Run) -> tuple[int, int]:
    """Return the fewest and the most workers: what was asked for, or what this machine holds; a cluster may grow."""
    from dpt_search.remote import capacity, is_cluster

    (fewest, most), held = run.config.workers, capacity(run.finetune_resources)
    if most > held and not is_cluster():
        run.say(f"finetune_workers is {run.config.finetune_workers}, but this machine holds {held}: using {held}")
        return min(fewest, held), held
    return fewest, most


def clear(run: Run, folder: str) -> None:
    """Delete what a fine-tune goes on from, once its stage is done and recorded."""
    for name in run.store.names(folder):
        if name in ("result.json", "progress.json") or (name.startswith("state") and name.endswith(".pt")):
            run.store.delete(f"{folder}/{name}")
