"""The long fine-tune: of the winner, and with the empty plan of a dense model that has to be adapted.

`finetune` is the loop of one of N workers and knows no Ray; `train_loop_per_worker` is what Ray Train calls.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch

from search_spaces import BadInput
from search_spaces.plan import PruningPlan
from trainables.checkpoints import Checkpoints
from trainables.data import ImageSet
from trainables.devices import DEVICES, describe, use_device
from trainables.engine import ALONE, Diverged, Training, evaluate
from trainables.group import Group
from trainables.locations import read_bytes, write_bytes
from trainables.tasks import FinetuneTask
from trainables.workspace import Workspace, versions


def finetune(task: FinetuneTask, report: Callable[[dict[str, Any]], None], group: Group = ALONE) -> dict[str, Any]:
    """Train all epochs that are left, evaluating on val after each; worker 0 writes states and weights.

    Args:
        task: what to do.
        report: called by every worker after every epoch with its record.
        group: the workers that do it.

    Returns:
        Plain data: the record of every epoch, the last accuracy, images per second and the device.

    Raises:
        BadInput: a batch cannot be shared by so many workers, or the model not trained as the recipe says.
    """
    workspace = Workspace(task, drop_path=task.recipe.drop_path)
    plan = PruningPlan.parse(task.plan)
    val = _part(workspace.images("val"), group)
    training = _training(task, workspace, plan, group)
    checkpoints = Checkpoints(task.state, task.checkpoint_every, task.checkpoint_seconds, task.checkpoints)
    epochs = _resume(task, checkpoints, training)
    while training.epochs_done < task.recipe.epochs:
        start = time.perf_counter()
        epoch = training.run_epoch()
        record: dict[str, Any] = {
            "epoch": epoch.number,
            "loss": epoch.loss,
            "images_per_second": group.world * epoch.images / epoch.seconds,
            "workers": group.world,
            "accuracy": _accuracy(task, workspace, training, val, group),
        }
        record["seconds"] = time.perf_counter() - start
        epochs.append(record)
        if group.rank == 0:
            checkpoints.offer(epoch.number, lambda: {**_about(task, epochs), "training": training.state_dict()})
            _show(task, epochs, checkpoints.newest)
        report(record)
    if group.rank == 0:
        write_bytes(task.weights, safetensors.torch.save(workspace.weights(training.result, plan)))
    return {
        "plan": task.plan,
        "epochs": epochs,
        "accuracy": epochs[-1]["accuracy"] if epochs else None,
        "workers": group.world,
        "device": describe(workspace.device),
        "versions": versions(),
    }


def _training(task: FinetuneTask, workspace: Workspace, plan: PruningPlan, group: Group) -> Training:
    model, fade = workspace.to_train(plan, task.start)
    try:
        return Training(
            model,
            workspace.images("train", streams=lambda own: group.any(own, workspace.device)),
            task.recipe,
            device=workspace.device,
            seed=task.seed,
            teacher=workspace.dense if task.recipe.distillation != "none" else None,
            group=group,
            workers=task.data.workers,
            fade=fade,
        )
    except ValueError as error:
        raise BadInput(str(error)) from None


def _part(images: ImageSet, group: Group) -> ImageSet:
    """Return the images that this worker evaluates on."""
    own = slice(group.rank, None, group.world)
    return ImageSet(images.pixels[own], images.labels[own], images.view)


def _accuracy(task: FinetuneTask, workspace: Workspace, training: Training, val: ImageSet, group: Group) -> float:
    """Return the accuracy on all of val, of which every worker evaluates its part."""
    right = np.zeros(0, bool)
    if len(val):
        right = evaluate(training.result, val, workspace.device, amp=task.recipe.amp, workers=task.data.workers)
    counts = group.sum(torch.tensor([right.sum(), len(right)], dtype=torch.float32, device=workspace.device))
    return float(counts[0]) / float(counts[1])


def _about(task: FinetuneTask, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"inputs": task.inputs, "epochs": epochs}


def _show(task: FinetuneTask, epochs: list[dict[str, Any]], saved: int) -> None:
    """Write what the driver shows, and how many of the epochs would not be repeated."""
    write_bytes(task.progress, json.dumps({**_about(task, epochs), "saved": saved}).encode())


def _resume(task: FinetuneTask, checkpoints: Checkpoints, training: Training) -> list[dict[str, Any]]:
    state = checkpoints.load(lambda state: bool(state["inputs"] == task.inputs))
    if state is None:
        return []
    training.load_state_dict(state["training"])
    epochs: list[dict[str, Any]] = state["epochs"]
    return epochs


def train_with_ray(task: FinetuneTask, resources: dict[str, float]) -> dict[str, Any]:
    """Run `finetune` on `task.workers` Ray Train workers, or on fewer while there are fewer; return worker 0's result.

    Runs inside a Ray task, because `ray.train.torch` imports torch and the driver must not.

    Args:
        task: what to do.
        resources: Ray resources of one worker.

    Raises:
        BadInput: it cannot be done as the task says, or its loss became no number.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    device = DEVICES[task.device]
    workers = task.workers if task.fewest >= task.workers else (task.fewest, task.workers)
    # A long training may lose workers many times; what always fails should not be tried for days.
    failures = FailureConfig(max_failures=max(3, task.recipe.epochs // 10))
    # Ray Train's own book-keeping goes here; what must last is in the task's folder.
    with tempfile.TemporaryDirectory(prefix="dpt_search_") as scratch:
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"task": task},
            torch_config=TorchConfig(backend=device.backend),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=device.is_gpu, resources_per_worker=resources),
            run_config=RunConfig(name="finetune", storage_path=scratch, failure_config=failures),
        )
        write_bytes(task.result, b"{}")
        _give_back_room()
        try:
            trainer.fit()
        except Exception:
            # The others of its group fail in ways of their own when one ends for a reason.
            _outcome(task)
            raise
    return _outcome(task)


def _give_back_room() -> None:
    """Give back the room of an earlier attempt that was lost with its node: Ray would keep it for as long as the driver
    lives, and this attempt would wait for it. While workers train, nothing else of a run reserves room."""
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    job = ray.get_runtime_context().get_job_id()
    for name, about in placement_group_table().items():
        # Such a name ends with that of the job it belongs to.
        if name.endswith(job) and about["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def _outcome(task: FinetuneTask) -> dict[str, Any]:
    """Return what worker 0 left, or raise BadInput with the reason that any of them left."""
    result: dict[str, Any] = json.loads(read_bytes(task.result))
    if "error" in result:
        raise BadInput(result["error"])
    return result


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Ray Train's loop: `finetune` with this worker's rank, distributed over the group."""
    from ray import train
    from ray.train.torch import get_device

    task: FinetuneTask = config["task"]
    context = train.get_context()
    group = Group(context.get_world_rank(), context.get_world_size(), most=task.workers)
    use_device(get_device())
    try:
        result = finetune(task, train.report, group)
    except (BadInput, Diverged) as error:
        # Trying again would end the same way: leave the reason, and end without Ray's retries.
        result = {"error": str(error)}
        write_bytes(task.result, json.dumps(result).encode())
        if group.world > 1 and isinstance(error, BadInput):
            # It may be this worker's alone, such as a full disk: the others wait for it, until it is gone.
            raise
    if group.rank == 0 and "error" not in result:
        write_bytes(task.result, json.dumps(result).encode())
