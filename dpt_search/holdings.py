"""What a cluster holds, what it waits for and whether it is growing, as Ray's control store and autoscaler tell it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Holdings:
    """A cluster at one moment.

    Attributes:
        nodes: resources of every node that is up.
        free: resources that nobody has taken, over all nodes.
        waiting: resources of what is waiting for room, one entry a shape.
        refused: of these, those that the autoscaler says no node type can give.
        coming: number of nodes that are being started.
    """

    nodes: tuple[Mapping[str, float], ...]
    free: Mapping[str, float]
    waiting: tuple[Mapping[str, float], ...]
    refused: tuple[Mapping[str, float], ...]
    coming: int

    def fits(self, wanted: Mapping[str, float]) -> bool:
        """Say whether a node that is up could hold this, if it were free."""
        return any(_fits(node, wanted) for node in self.nodes)

    def waits(self, wanted: Mapping[str, float]) -> bool:
        """Say whether something of this shape waits for room."""
        return _kept(wanted) in map(_kept, self.waiting)

    def refuses(self, wanted: Mapping[str, float]) -> bool:
        """Say whether the autoscaler has told that no node type can give this."""
        return _kept(wanted) in map(_kept, self.refused)

    def told(self, wanted: Mapping[str, float]) -> str:
        """Say what is wanted, what is there and what is coming."""
        up = (
            "no node is up"
            if not self.nodes
            else f"{len(self.nodes)} node{'s are' if len(self.nodes) > 1 else ' is'} up"
        )
        held = {name: sum(node.get(name, 0) for node in self.nodes) for name in wanted}
        has = ", ".join(f"{self.free.get(name, 0):g} of {held[name]:g} {name} free" for name in wanted)
        if self.refuses(wanted):
            more = "the autoscaler has no node type that gives this"
        elif self.coming:
            more = f"{self.coming} more being started"
        elif self.fits(wanted):
            more = "others have the rest"
        else:
            more = "none is being started (`ray status` says more)"
        return f"{shape(wanted)} wanted on one node; {up} ({has}); {more}"


def shape(wanted: Mapping[str, float]) -> str:
    """Return resources as a person says them."""
    return " and ".join(f"{amount:g} {name}" for name, amount in wanted.items())


def _fits(node: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in wanted.items())


def _kept(wanted: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in wanted.items() if amount}


def holdings() -> Holdings:
    """Return what the cluster that was joined holds now."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.autoscaler.v2.schema import Stats
    from ray.autoscaler.v2.utils import ClusterStatusParser
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    # `ray.autoscaler.v2.sdk.get_cluster_status` asks the same, and leaves out what no node type can give.
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    status = ClusterStatusParser.from_get_cluster_status_reply(reply, stats=Stats())
    demands = [*status.resource_demands.ray_task_actor_demand, *status.resource_demands.placement_group_demand]
    impossible = [
        *reply.autoscaling_state.infeasible_resource_requests,
        *(each for gang in reply.autoscaling_state.infeasible_gang_resource_requests for each in gang.requests),
    ]
    launched = sum(launch.count for launch in status.pending_launches)
    return Holdings(
        nodes=tuple(node["Resources"] for node in ray.nodes() if node["Alive"]),
        free=ray.available_resources(),
        waiting=tuple(each.bundle for demand in demands for each in demand.bundles_by_count),
        refused=tuple(dict(each.resources_bundle) for each in impossible),
        coming=len(status.pending_nodes) + launched + _coming_by_first_autoscaler(),
    )


def nodes_that_fit(wanted: Mapping[str, float]) -> list[str]:
    """Return the ids of the nodes that are up and could hold this."""
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and _fits(node["Resources"], wanted)]


def _coming_by_first_autoscaler() -> int:
    """Return what the autoscaler before v2 is starting: it reports to a place of its own."""
    from ray.experimental.internal_kv import _internal_kv_get

    told = _internal_kv_get("__autoscaling_status")
    report = (json.loads(told) if told else {}).get("autoscaler_report") or {}
    return len(report.get("pending_nodes") or ()) + sum((report.get("pending_launches") or {}).values())
