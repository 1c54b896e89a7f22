"""Ray, started or joined, and work sent to it by name: the driver itself imports no torch."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dpt_search.config import BadConfig, RunConfig
from search_spaces import BadInput
from trainables.devices import DEVICES

OBJECT_STORE_BYTES = 200 * 2**20


class StageFailed(RuntimeError):
    """Work on a worker failed; the message is the worker's own trace."""


@contextmanager
def ray_session(config: RunConfig) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine; shut down what was started.

    Raises:
        BadConfig: no node has the device.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # Tune and Train would print banners and tables of their own.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    import ray

    joined = bool(os.environ.get("RAY_ADDRESS"))
    local = {} if joined else {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(log_to_driver=False, logging_level="ERROR", **local)
    try:
        resource = DEVICES[config.device].resource
        if not ray.cluster_resources().get(resource):
            raise BadConfig(f"device {config.device!r} needs a node with the Ray resource {resource!r}; none has it")
        yield
    finally:
        ray.shutdown()


def resources(config: RunConfig, cpus: float, devices: float) -> dict[str, float]:
    """Return the Ray resources of one worker: CPUs, and accelerators where the device is one."""
    resource = DEVICES[config.device].resource
    return {"CPU": cpus} if resource == "CPU" else {"CPU": cpus, resource: devices}


def capacity(wanted: dict[str, float]) -> int:
    """Return how many workers of these resources the cluster holds now."""
    import ray

    held = ray.cluster_resources()
    return min(int(held.get(name, 0) // amount) for name, amount in wanted.items() if amount)


def call(
    config: RunConfig,
    target: str,
    *args: Any,
    cpus: float = 1,
    devices: float = 1.0,
    on_wait: Callable[[], None] = lambda: None,
) -> Any:
    """Call `module:function` on a worker that has the device, and return its plain result.

    On an accelerator the worker's process ends with the call, so that a stage leaves none of its memory behind; on
    CPUs the next stage saves importing torch again.

    Args:
        config: the run's configuration.
        target: what to call.
        args: its arguments, plain data.
        cpus: CPU cores to reserve.
        devices: accelerators to reserve, where the device is one.
        on_wait: called about once a second until the result is there.

    Raises:
        BadInput: the worker found the user's input wrong.
        StageFailed: anything else went wrong.
    """
    import ray

    wanted = resources(config, cpus, devices)
    cpus, gpus = wanted.pop("CPU"), wanted.pop("GPU", 0)
    calls = 0 if config.device == "cpu" else 1
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, resources=wanted, max_calls=calls, max_retries=2)
    pending = remote(_call).remote(target, args)
    while not ray.wait([pending], timeout=1.0)[0]:
        on_wait()
    status, value = ray.get(pending)
    if status == "bad input":
        raise BadInput(value)
    if status == "failed":
        raise StageFailed(f"{target} failed on a worker:\n{value}")
    return value


def _call(target: str, args: tuple[Any, ...]) -> tuple[str, Any]:
    """Run on the worker; errors come back as text, because unpickling them could import torch on the driver."""
    module, _, function = target.partition(":")
    try:
        return "done", getattr(importlib.import_module(module), function)(*args)
    except BadInput as error:
        return "bad input", str(error)
    except Exception:  # whatever it is, the driver has to show it
        return "failed", traceback.format_exc()
