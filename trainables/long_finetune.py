"""The long fine-tune: of the winner, and with the empty plan of a dense model that has to be adapted.

`finetune` is the loop of one of N workers and knows no Ray; `train_loop_per_worker` is what Ray Train calls.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

from search_spaces import BadInput
from search_spaces.plan import PruningPlan
from trainables.checkpoints import load_state, save_state
from trainables.devices import DEVICES, describe, use_device
from trainables.engine import Diverged, Epoch, Training, evaluate
from trainables.locations import read_bytes, write_bytes
from trainables.tasks import FinetuneTask
from trainables.workspace import Workspace, versions


def finetune(
    task: FinetuneTask,
    report: Callable[[dict[str, Any]], None],
    *,
    rank: int = 0,
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model,
) -> dict[str, Any]:
    """Train all epochs that are left, evaluating on val after each; worker 0 writes state and weights.

    Args:
        task: what to do.
        report: called by every worker after every epoch with its record.
        rank: this worker's number.
        wrap: makes the distributed form of the model.

    Returns:
        Plain data: the record of every epoch, the last accuracy, images per second and the device.
    """
    workspace = Workspace(task, drop_path=task.recipe.drop_path)
    val = workspace.images("val")
    plan = PruningPlan.parse(task.plan)
    model, fade = workspace.to_train(plan, task.start)
    training = Training(
        model,
        workspace.images("train"),
        task.recipe,
        device=workspace.device,
        seed=task.seed,
        teacher=workspace.dense if task.recipe.distillation != "none" else None,
        rank=rank,
        world=task.workers,
        workers=task.data.workers,
        wrap=wrap,
        fade=fade,
    )
    epochs = _resume(task, training)
    while training.epochs_done < task.recipe.epochs:
        start = time.perf_counter()
        epoch = training.run_epoch()
        record = _record(task, epoch)
        if rank == 0:
            right = evaluate(training.result, val, workspace.device, amp=task.recipe.amp)
            record |= {"accuracy": float(right.mean()), "seconds": time.perf_counter() - start}
            epochs.append(record)
            save_state(task.state, {"inputs": task.inputs, "training": training.state_dict(), "epochs": epochs})
            write_bytes(task.progress, json.dumps({"inputs": task.inputs, "epochs": epochs}).encode())
        report(record)
    if rank == 0:
        write_bytes(task.weights, safetensors.torch.save(workspace.weights(training.result, plan)))
    return {
        "plan": task.plan,
        "epochs": epochs,
        "accuracy": epochs[-1]["accuracy"] if epochs else None,
        "workers": task.workers,
        "device": describe(workspace.device),
        "versions": versions(),
    }


def _resume(task: FinetuneTask, training: Training) -> list[dict[str, Any]]:
    state = load_state(task.state)
    if state is None or state["inputs"] != task.inputs:
        return []
    training.load_state_dict(state["training"])
    epochs: list[dict[str, Any]] = state["epochs"]
    return epochs


def _record(task: FinetuneTask, epoch: Epoch) -> dict[str, Any]:
    return {
        "epoch": epoch.number,
        "loss": epoch.loss,
        "images_per_second": task.workers * epoch.images / epoch.seconds,
    }


def train_with_ray(task: FinetuneTask, resources: dict[str, float]) -> dict[str, Any]:
    """Run `finetune` on `task.workers` Ray Train workers and return worker 0's result.

    Runs inside a Ray task, because `ray.train.torch` imports torch and the driver must not.

    Args:
        task: what to do.
        resources: Ray resources of one worker.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    device = DEVICES[task.device]
    # Ray Train's own book-keeping goes here; what must last is in the task's folder.
    with tempfile.TemporaryDirectory(prefix="dpt_search_") as scratch:
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"task": task},
            torch_config=TorchConfig(backend=device.backend),
            scaling_config=ScalingConfig(
                num_workers=task.workers, use_gpu=device.is_gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(name="finetune", storage_path=scratch, failure_config=FailureConfig(max_failures=3)),
        )
        trainer.fit()
    result: dict[str, Any] = json.loads(read_bytes(task.result))
    if "error" in result:
        raise BadInput(result["error"])
    return result


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Ray Train's loop: `finetune` with this worker's rank, distributed over the group."""
    from ray import train
    from ray.train.torch import get_device

    task: FinetuneTask = config["task"]
    rank = train.get_context().get_world_rank()
    use_device(get_device())
    try:
        result = finetune(task, train.report, rank=rank, wrap=_distributed if task.workers > 1 else lambda model: model)
    except (BadInput, Diverged) as error:
        # Trying again would end the same way: leave the reason, and end without Ray's retries.
        result = {"error": str(error)}
    if rank == 0 or "error" in result:
        write_bytes(task.result, json.dumps(result).encode())


def _distributed(model: torch.nn.Module) -> torch.nn.Module:
    device = next(model.parameters()).device
    ids = None if device.type == "cpu" else [device]
    # A removed attention may leave weights that nothing uses, such as a bias that the blocks shared: always the same.
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, static_graph=True)
