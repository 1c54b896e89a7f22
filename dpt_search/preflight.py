"""What can be seen to be wrong with where a run is to be, before anything is paid for: one line each, exit code 2."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpt_search.config import BadConfig, RunConfig
from dpt_search.holdings import holdings, nodes_that_fit, shape
from dpt_search.remote import begin, call_on, capacity, is_cluster, resources
from dpt_search.store import BadRun, RunStore
from dpt_search.waiting import Waiting
from trainables.devices import DEVICES
from trainables.preflight import sees, versions
from trainables.tasks import LookTask

AGAIN_SECONDS = 5.0
"""Time after which a node that has just joined is looked at again before it is refused."""
PATIENCE_SECONDS = 20.0
"""How long nothing may be coming that could hold a trial; an autoscaler looks every five seconds."""
ANSWER_SECONDS = 10.0
"""By when an autoscaler has answered; nodes that were coming before are no answer."""


def check_place(config: RunConfig) -> None:
    """Refuse a run directory that would go with the job that this process is.

    Raises:
        BadConfig: inside a job of Ray's it is relative.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        check_absolute(config.run_dir)


def check_absolute(run_dir: str) -> None:
    """Refuse a relative run directory of a job: there it is in a folder of one node that is deleted after the job."""
    if run_dir and "://" not in run_dir and not Path(run_dir).expanduser().is_absolute():
        raise BadConfig(
            f"run_dir {run_dir!r} is relative, which in a job is a folder that goes with it: give --run-dir a place "
            "that every node reaches, such as s3://bucket/runs/NAME or /shared/runs/NAME"
        )


class Preflight:
    """Looks at where a run is to be: at this machine once, at every node of a cluster when it is first seen."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()
        self._roomy: list[dict[str, float]] = []
        self._placed: list[tuple[int, dict[str, float]]] = []
        # The driver needs no torch: of what it lacks, the first node tells what the others are to have.
        self._versions = versions()

    def check(self, config: RunConfig, store: RunStore, say: Callable[[str], None]) -> None:
        """Look at what was not looked at yet.

        Raises:
            BadConfig: a trial fits nowhere; data, weights or versions are not there or not the same everywhere.
            BadRun: the run directory is not one place for all nodes.
        """
        wanted = resources(config, config.cpus_per_trial, config.devices_per_trial)
        if wanted not in self._roomy:
            if is_cluster():
                _await_room(config, wanted, say)
            else:
                _check_here(config, wanted)
            self._roomy.append(wanted)
        if is_cluster():
            new = [name for name in nodes_that_fit(wanted) if (store.location, name) not in self._seen]
            if new:
                self._seen |= {(store.location, name) for name in self._check_twice(config, store, new)}

    def check_workers(self, config: RunConfig, say: Callable[[str], None]) -> None:
        """Look whether the workers of the long fine-tune will fit, as far as that can be seen before any is needed.

        Raises:
            BadConfig: the fewest of them do not fit, and the cluster does not grow.
        """
        each = resources(config, config.cpus_per_trial, 1.0)
        asked = (config.workers[0], each)
        if is_cluster() and asked not in self._placed:
            _await_workers(config, each, say)
            self._placed.append(asked)

    def _check_twice(self, config: RunConfig, store: RunStore, nodes: list[str]) -> list[str]:
        """Look at nodes, at those that have just joined a second time before they end the run: mounts may come late."""
        try:
            return self._check_nodes(config, store, nodes)
        except (BadConfig, BadRun):
            if not self._seen:
                raise
        time.sleep(AGAIN_SECONDS)
        return self._check_nodes(config, store, nodes)

    def _check_nodes(self, config: RunConfig, store: RunStore, nodes: list[str]) -> list[str]:
        """Look at nodes, and return those that could be looked at."""
        folder, token, driver = f"preflight-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex, socket.gethostname()
        task = LookTask(config.model, config.data, store.path(folder), token, node="", driver=driver)
        store.write(f"{folder}/driver", token.encode())
        try:
            found = call_on("trainables.preflight:look", {name: (replace(task, node=name),) for name in nodes})
            for name, each in found.items():
                unseen = each["run_dir"] or (
                    "" if sees(f"{task.folder}/{name}", token.encode()) else "writes there what the driver does not see"
                )
                if unseen:
                    raise BadRun(
                        f"run directory {store.location!r}: node {each['host']} {unseen}. Give --run-dir a place that "
                        "is one for all nodes, such as s3://bucket/runs/NAME or a shared file system"
                    )
                self._check_node(each)
            return list(found)
        finally:
            store.delete_dir(folder)

    def _check_node(self, found: dict[str, Any]) -> None:
        host = found["host"]
        for problem in found["unread"]:
            raise BadConfig(f"node {host} {problem}: put it there on every node, or give a place that all reach")
        for name, version in found["versions"].items():
            known = self._versions.setdefault(name, version)
            if version != known:
                raise BadConfig(
                    f"node {host} has {name} {version}, but the driver or another node {known}: install the same on "
                    "every node"
                )


def _check_here(config: RunConfig, wanted: dict[str, float]) -> None:
    """Refuse what this machine cannot hold: it will not grow."""
    import ray

    held, resource = ray.cluster_resources(), DEVICES[config.device].resource
    if not held.get(resource):
        raise BadConfig(f"device {config.device!r} needs a node with the Ray resource {resource!r}; none has it")
    if any(held.get(name, 0) < amount for name, amount in wanted.items()):
        lacks = ", ".join(f"{held.get(name, 0):g} of {amount:g} {name}" for name, amount in wanted.items())
        raise BadConfig(f"a trial does not fit here ({lacks}): set smaller cpus_per_trial or devices_per_trial")


def _await_room(config: RunConfig, wanted: dict[str, float], say: Callable[[str], None]) -> None:
    """Wait for a node that can hold a trial while the cluster grows; refuse to wait for what will not come."""
    held = holdings()
    if held.fits(wanted):
        return
    say(f"no node can hold a trial yet ({shape(wanted)}): waiting for one")
    pending = begin(
        config, "trainables.preflight:versions", cpus=config.cpus_per_trial, devices=config.devices_per_trial
    )
    waiting, hope = Waiting(say, wanted), time.monotonic()
    while not pending.is_done(1.0):
        # A control store that is slow while nodes start is no news, unless it stays so.
        with suppress(Exception):
            held = holdings()
        if held.coming or held.fits(wanted):
            hope = time.monotonic()
        if held.refuses(wanted) or time.monotonic() - hope > PATIENCE_SECONDS:
            raise BadConfig(
                f"no node can hold a trial: {held.told(wanted)}. Set smaller cpus_per_trial or devices_per_trial, "
                "another --device, or add such nodes"
            )
        waiting.look()
    pending.value()


def _await_workers(config: RunConfig, each: dict[str, float], say: Callable[[str], None]) -> None:
    """Refuse workers of the long fine-tune that a cluster cannot hold, unless it grows when one more is asked for.

    Where it grows, room for all of them would cost nodes that idle until the search has ended.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    fewest, held = config.workers[0], capacity(each)
    if held >= fewest:
        return
    say(
        f"the long fine-tune needs {fewest} workers of {shape(each)}, and there is room for {held}: asking for one more"
    )
    more = placement_group([each] * (held + 1))
    begun = time.monotonic()
    try:
        while (waited := time.monotonic() - begun) < PATIENCE_SECONDS:
            with suppress(Exception):
                now = holdings()
                if now.refuses(each):
                    break
                if capacity(each) > held or (now.coming and waited > ANSWER_SECONDS):
                    return
            time.sleep(1.0)
    finally:
        remove_placement_group(more)
    fewer = f"--finetune-workers {held}, or 1..{config.workers[1]} for as many as there are, " if held else ""
    raise BadConfig(
        f"finetune_workers is {config.finetune_workers}, but the cluster has room for {held} workers of {shape(each)} "
        f"and did not begin to grow when one more was asked for: set {fewer}smaller cpus_per_trial, or add nodes"
    )
