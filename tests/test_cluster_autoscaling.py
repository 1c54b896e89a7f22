"""A cluster that grows and shrinks by itself, on this machine: Ray's own autoscaler, with raylets for nodes."""

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clusters import Head, growing_cluster
from driver import command, embedded_part, outcomes

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
MOST = 3
IDLE_SECONDS = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    """A cluster of no nodes yet, and at most three; this process has joined it, as an onlooker."""
    import ray

    with pytest.MonkeyPatch.context() as patched, growing_cluster({"CPU": 1, "NPU": 2}, MOST, IDLE_SECONDS) as head:
        for name, value in head.environment.items():
            patched.setenv(name, value)
        ray.init(log_to_driver=False, logging_level="ERROR")
        yield head
        ray.shutdown()


def workers() -> list[str]:
    """Return the nodes that are there, but for the head."""
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def activity() -> list[str]:
    """Return what keeps each node, as the autoscaler has it."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return [f"{node.node_status} {node.node_activity}" for node in [*status.active_nodes, *status.idle_nodes]]


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s; nodes: {activity()}"
        time.sleep(0.2)


def test_a_task_that_wants_an_npu_gets_a_node_and_is_told_which_card(cluster: Head) -> None:
    import ray

    @ray.remote(num_cpus=1, resources={"NPU": 1})
    def cards() -> str | None:
        import os

        return os.environ.get("ASCEND_RT_VISIBLE_DEVICES")

    assert workers() == []
    assert ray.get(cards.remote()) in ("0", "1")
    assert len(workers()) == 1


def test_as_many_nodes_come_as_are_of_use_and_go_when_they_are_not(cluster: Head) -> None:
    from dpt_search.demand import Demand

    wanted = {"CPU": 1, "NPU": 1.0}
    with Demand(wanted, most=2) as demand:
        assert demand.room(left=10) == 1
        wait_for(lambda: demand.room(left=10) == 2, 90)
        time.sleep(3)
        assert len(workers()) == 2
    with Demand(wanted, most=10) as demand:
        wait_for(lambda: demand.room(left=10) == MOST, 90)
        # What is left of a search needs no more than one.
        wait_for(lambda: demand.room(left=1) and len(workers()) <= 1, 60)
    wait_for(lambda: not workers(), 60)


def test_workers_of_the_fine_tune_are_refused_where_no_node_type_has_room_for_one(cluster: Head) -> None:
    from dpt_search.config import BadConfig, RunConfig
    from dpt_search.preflight import Preflight

    said = list[str]()
    # Each takes a node of its own, and there is none now.
    Preflight().check_workers(RunConfig(device="npu", finetune_workers=2), said.append)
    assert said == [
        "the long fine-tune needs 2 workers of 1 CPU and 1 NPU, and there is room for 0: asking for one more"
    ]
    wait_for(workers, 60)
    lacking = "room for 0 workers of 2 CPU and 1 NPU and did not begin to grow when one more was asked for: set smaller"
    with pytest.raises(BadConfig, match=lacking):
        Preflight().check_workers(RunConfig(device="npu", finetune_workers=1, cpus_per_trial=2), said.append)
    wait_for(lambda: not workers(), 90)


def test_a_search_grows_the_cluster_uses_all_of_it_and_lets_it_go_while_the_fine_tune_runs(
    cluster: Head, tmp_path: Path
) -> None:
    import ray

    assert workers() == []
    data = tmp_path / "data"
    data.mkdir()
    config = embedded_part(
        data, {"train": 1200, "probe": 100, "val": 200, "test": 200}, data={"subset": 1000}, max_trials=10,
        timing_seconds=1.0, rank_batches=2, probe_epochs=0, trial={"epochs": 3, "batch_size": 32},
        finetune={"epochs": 24, "batch_size": 32}, finetune_workers=1, export_formats="safetensors",
    )  # fmt: skip
    run, seen = tmp_path / "run", []
    start = command("run", "--config", config, "--run-dir", run)
    with (tmp_path / "said.txt").open("w") as said:
        driver = subprocess.Popen(start, env=cluster.environment, stdout=said, stderr=said)
        while driver.poll() is None:
            # From its first epoch on the fine-tune has its worker; until then all nodes may have gone.
            searched, tuned = (run / "stages" / "search.json").exists(), (run / "finetune" / "progress.json").exists()
            seen.append(("fine-tune" if tuned else "other" if searched else "search", len(workers())))
            time.sleep(0.2)
    told = (tmp_path / "said.txt").read_text()
    assert driver.returncode == 0, told
    # A tenth of the 32 cells of the four budgets: more nodes would decide no sooner.
    assert "search: 10 trials, 3 at a time" in told
    assert max(nodes for stage, nodes in seen if stage == "search") == MOST, told
    actors = list(ray._private.state.actors().values())
    # Tune wraps the class of the trials; the fine-tune's actors have other names.
    used = {actor["Address"]["NodeID"] for actor in actors if "Trainable" in actor["ActorClassName"]}
    assert len(used) == MOST, Counter(actor["ActorClassName"] for actor in actors)
    assert min(nodes for stage, nodes in seen if stage == "fine-tune") == 1, told
    found = outcomes(run)
    assert len(found) == 10
    assert all(len(accuracies) == 3 for _, accuracies in found)
    wait_for(lambda: not workers(), 60)
