"""Ray, started or joined, and work sent to it by name: the driver itself imports no torch."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dpt_search.config import BadConfig, RunConfig
from search_spaces import BadInput
from trainables.devices import DEVICES

OBJECT_STORE_BYTES = 200 * 2**20
RETRIES = 2
"""How often work whose worker was lost is given to another."""


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
    # Tune would take Ctrl-C for the end of the search, and the run would go on to the fine-tune.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    import ray

    own = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(log_to_driver=False, logging_level="ERROR", **({} if is_cluster() else own))
    try:
        resource = DEVICES[config.device].resource
        if not ray.cluster_resources().get(resource) and not is_cluster():
            raise BadConfig(f"device {config.device!r} needs a node with the Ray resource {resource!r}; none has it")
        wanted = resources(config, config.cpus_per_trial, config.devices_per_trial)
        if capacity(wanted) < 1 and not is_cluster():
            held = ray.cluster_resources()
            lacks = ", ".join(f"{held.get(name, 0):g} of {amount:g} {name}" for name, amount in wanted.items())
            raise BadConfig(f"a trial does not fit here ({lacks}): set smaller cpus_per_trial or devices_per_trial")
        yield
    finally:
        ray.shutdown()


def is_cluster() -> bool:
    """Say whether Ray was joined, not started here: a cluster may have nodes to come."""
    return bool(os.environ.get("RAY_ADDRESS"))


def resources(config: RunConfig, cpus: float, devices: float) -> dict[str, float]:
    """Return the Ray resources of one worker: CPUs, and accelerators where the device is one."""
    resource = DEVICES[config.device].resource
    return {"CPU": cpus} if resource == "CPU" else {"CPU": cpus, resource: devices}


def capacity(wanted: dict[str, float]) -> int:
    """Return how many workers of these resources the cluster holds now, each of them whole on one node."""
    import ray

    nodes = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return sum(min(int(held.get(name, 0) // amount) for name, amount in wanted.items() if amount) for held in nodes)


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
    pending = begin(config, target, *args, cpus=cpus, devices=devices)
    while not pending.is_done(1.0):
        on_wait()
    return pending.value()


def call_here(target: str, *args: Any) -> Any:
    """Call `module:function` in a fresh process of this machine, without Ray; raises what `call` does."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return _value(target, pool.submit(_call, target, args).result())
    except BrokenProcessPool:
        raise StageFailed(f"the process of {target} was lost") from None


@dataclass(frozen=True)
class Pending:
    """A call that is under way on a worker."""

    target: str
    reference: Any

    def is_done(self, seconds: float = 0.0) -> bool:
        """Say whether it has ended, waiting for at most so long."""
        import ray

        return bool(ray.wait([self.reference], timeout=seconds)[0])

    def value(self) -> Any:
        """Return its result, waiting for it; raises what `call` does."""
        import ray

        try:
            outcome = ray.get(self.reference)
        except ray.exceptions.RayError as error:
            raise StageFailed(f"the worker of {self.target} was lost: {str(error).strip().splitlines()[0]}") from None
        return _value(self.target, outcome)


def begin(config: RunConfig, target: str, *args: Any, cpus: float = 1, devices: float = 1.0) -> Pending:
    """Begin what `call` does, and return at once."""
    remote = _remote(resources(config, cpus, devices), calls=0 if config.device == "cpu" else 1)
    return Pending(target, remote.remote(target, args))


def call_each(wanted: dict[str, float], target: str, jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Call `module:function` once a job, in order, as many at a time as there is room for; processes are used again.

    Args:
        wanted: Ray resources of one call.
        target: what to call.
        jobs: the arguments of each call, plain data.

    Yields:
        Each job's position and result, as they end; None for a job whose worker was lost every time.

    Raises:
        BadInput: a worker found the user's input wrong.
        StageFailed: anything else went wrong.
    """
    import ray

    remote, left = _remote(wanted, calls=0), list(enumerate(jobs))[::-1]
    running: dict[Any, int] = {}
    while running or left:
        # A cluster that grows on demand sees how much is wanted.
        while left and (is_cluster() or len(running) <= capacity(wanted)):
            position, args = left.pop()
            running[remote.remote(target, args)] = position
        (ended, *_), _ = ray.wait(list(running))
        try:
            value = _value(target, ray.get(ended))
        except ray.exceptions.NodeDiedError:
            # No fault of the job's.
            left.append((running[ended], jobs[running.pop(ended)]))
            continue
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            value = None
        yield running.pop(ended), value


def _remote(wanted: dict[str, float], calls: int) -> Any:
    """Return `_call` as a Ray function whose process ends after so many calls; 0 for never."""
    import ray

    others = {name: amount for name, amount in wanted.items() if name not in ("CPU", "GPU")}
    return ray.remote(
        num_cpus=wanted["CPU"], num_gpus=wanted.get("GPU", 0), resources=others, max_calls=calls, max_retries=RETRIES
    )(_call)


def _value(target: str, outcome: tuple[str, Any]) -> Any:
    status, value = outcome
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
