"""Ray, started or joined, and work sent to it by name: the driver itself imports no torch."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from dpt_search.config import BadConfig, RunConfig
from search_spaces import BadInput
from trainables.devices import DEVICES, RAY_ARGUMENTS

OBJECT_STORE_BYTES = 200 * 2**20
REACH_SECONDS = 10.0
RETRIES = 2
"""How often work whose worker was lost is given to another."""


class StageFailed(RuntimeError):
    """Work on a worker failed; the message is the worker's own trace."""


@contextmanager
def ray_session() -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine; shut down what was started.

    Raises:
        BadConfig: the cluster at RAY_ADDRESS cannot be joined.
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

    if is_cluster():
        _check_address(os.environ["RAY_ADDRESS"])
    before = signal.getsignal(signal.SIGTERM)
    own = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **({} if is_cluster() else own))
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        if not is_cluster():
            raise
        why = " ".join(str(error).split())
        raise BadConfig(f"cannot join the Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {why}") from None
    if callable(before) and threading.current_thread() is threading.main_thread():
        # Ray would leave the process at once on SIGTERM; the lease has to be given up first.
        signal.signal(signal.SIGTERM, before)
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address where nobody is: Ray would try to reach it for ever."""
    if address.startswith(("http://", "https://")):
        raise BadConfig(
            f"RAY_ADDRESS is {address!r}, that of a job server: give HEAD:6379, or use `dpt-search submit` with it"
        )
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    try:
        if port.isdigit():
            reach(host, int(port))
    except OSError as error:
        raise BadConfig(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): give its HEAD:6379, or unset RAY_ADDRESS to "
            "run on this machine"
        ) from None


def reach(host: str, port: int) -> None:
    """Open a connection and close it; raises OSError where nobody answers in time."""
    socket.create_connection((host.strip("[]"), port), timeout=REACH_SECONDS).close()


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
    """A call that is under way on a worker.

    Attributes:
        target: what was called.
        reference: Ray's, of its result.
        reserved: Ray's placement group, where room was reserved for it.
    """

    target: str
    reference: Any
    reserved: Any = None

    def has_room(self) -> bool:
        """Say whether the room that was reserved is there; one that is free is there within a second."""
        return bool(self.reserved.wait(1))

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
        finally:
            if self.reserved is not None:
                ray.util.remove_placement_group(self.reserved)
        return _value(self.target, outcome)


def begin(config: RunConfig, target: str, *args: Any, cpus: float = 1, devices: float = 1.0) -> Pending:
    """Begin what `call` does, and return at once."""
    remote = _remote(resources(config, cpus, devices), calls=0 if config.device == "cpu" else 1)
    return Pending(target, remote.remote(target, args))


def begin_in_own_room(config: RunConfig, target: str, *args: Any, cpus: float = 1, devices: float = 1.0) -> Pending:
    """Begin what `call` does as soon as room is reserved for it, which can be asked for; return at once."""
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    wanted = resources(config, cpus, devices)
    reserved = placement_group([wanted])
    remote = _remote(wanted, calls=0 if config.device == "cpu" else 1)
    own = remote.options(scheduling_strategy=PlacementGroupSchedulingStrategy(reserved))
    return Pending(target, own.remote(target, args), reserved)


def call_on(target: str, jobs: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Call `module:function` on nodes at once, taking none of their resources; a node that was lost is left out.

    Args:
        target: what to call.
        jobs: by node id, the arguments of the call there, plain data.

    Raises:
        StageFailed: anything else went wrong.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def on(node: str) -> Any:
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(num_cpus=0, scheduling_strategy=place)(_call)

    running, found = {node: on(node).remote(target, args) for node, args in jobs.items()}, {}
    for node, reference in running.items():
        # Such as TaskUnschedulableError.
        with suppress(ray.exceptions.RayError):
            found[node] = _value(target, ray.get(reference))
    return found


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

    own = {RAY_ARGUMENTS[name]: amount for name, amount in wanted.items() if name in RAY_ARGUMENTS}
    others = {name: amount for name, amount in wanted.items() if name not in RAY_ARGUMENTS}
    return ray.remote(**own, resources=others, max_calls=calls, max_retries=RETRIES)(_call)


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
