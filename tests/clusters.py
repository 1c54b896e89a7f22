"""What tests that start clusters share: clusters on this machine, which end with the test."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD_ID = "f" * 51 + "00000"
STORE_BYTES = 100 * 2**20


def free_ports(count: int) -> list[int]:
    """Return so many different ports that nobody listens on just now."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in taken]


@dataclass(frozen=True)
class Head:
    """A head node that is up.

    Attributes:
        address: what RAY_ADDRESS names.
        folder: its temporary directory, which all its nodes' processes name.
    """

    address: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a program that joins it."""
        return cluster_environment() | {"RAY_ADDRESS": self.address}


def cluster_environment() -> dict[str, str]:
    """Return the environment of a cluster's processes: this checkout, one thread each, no token, nothing reported."""
    told = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, **told, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def growing_cluster(node: dict[str, float], most: int, idle_seconds: float) -> Iterator[Head]:
    """Start a head without CPUs, and Ray's autoscaler, which starts further raylets of this machine as nodes.

    Args:
        node: resources of a worker node.
        most: worker nodes, at most.
        idle_seconds: after which an idle node is let go.
    """
    with tempfile.TemporaryDirectory(prefix="dg", dir="/tmp") as made:
        folder, (port,) = Path(made), free_ports(1)
        scaling = folder / "scaling.json"
        scaling.write_text(json.dumps(_scaling(f"127.0.0.1:{port}", node, most, idle_seconds)))
        told = {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        }
        with _head(folder, port, told, f"--autoscaling-config={scaling}") as head:
            yield head


@contextlib.contextmanager
def fixed_cluster() -> Iterator[Head]:
    """Start a head without CPUs; nodes are added and lost by the test."""
    # Nodes that are lost are missed within seconds; on a busy machine not at once.
    told = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "8"}
    with tempfile.TemporaryDirectory(prefix="dn", dir="/tmp") as made, _head(Path(made), *free_ports(1), told) as head:
        yield head


@contextlib.contextmanager
def _head(folder: Path, port: int, told: dict[str, str], *options: str) -> Iterator[Head]:
    address = f"127.0.0.1:{port}"
    start = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}", *options]
    try:
        head = _start(start, cluster_environment() | told, folder / "head.txt")
        _wait_for(port, head, folder / "head.txt")
        yield Head(address, folder)
    finally:
        end(folder.name)


def _start(options: list[str], environment: dict[str, str], said: Path, hidden: str = "") -> "subprocess.Popen[bytes]":
    ray = str(Path(sys.executable).parent / "ray")
    node = ["--block", "--node-ip-address=127.0.0.1", f"--object-store-memory={STORE_BYTES}"]
    command = [ray, "start", *node, *options]
    if hidden:
        # `$0` is the folder, `$@` the command.
        command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', hidden, *command]
    with said.open("w") as stream:
        return subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)


def may_isolate() -> bool:
    """Say whether a node can be given a folder of its own in place of one of this machine's."""
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def add_node(head: Head, resources: dict[str, float], hidden: Path) -> str:
    """Start a node; return its mark, for `lose`.

    Args:
        head: of the cluster.
        resources: of the node.
        hidden: a folder for temporary files, in whose place the node sees an empty one of its own, as it would on
            another machine.
    """
    mark = f"{head.folder.name}-{uuid.uuid4().hex}"
    others = {name: amount for name, amount in resources.items() if name != "CPU"}
    options = [f"--address={head.address}", f"--num-cpus={resources['CPU']:g}", f"--resources={json.dumps(others)}"]
    environment = cluster_environment() | {"NODE_OF_A_TEST": mark, "TMPDIR": str(hidden)}
    _start(options, environment, head.folder / f"{mark}.txt", str(hidden) if may_isolate() else "")
    return mark


def wait_for_nodes(address: str, count: int) -> None:
    """Wait until a cluster has so many nodes, its head counted."""
    code = (
        "import sys, time, ray._raylet\n"
        "for _ in range(240):\n"
        "    try:\n"
        f"        nodes = ray._raylet.GcsClient(address={address!r}).get_all_node_info(timeout=5).values()\n"
        f"        if sum(node.state == 0 for node in nodes) >= {count}: sys.exit()\n"
        "    except ray.exceptions.RpcError: pass\n"
        "    time.sleep(0.5)\n"
        "sys.exit('the nodes did not come up')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=cluster_environment())


def _scaling(address: str, node: dict[str, float], most: int, idle_seconds: float) -> dict[str, object]:
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True,
        "head_node_id": HEAD_ID,
        "gcs_address": address,
    }
    return {
        "cluster_name": "growing",
        "provider": provider,
        "max_workers": most,
        "idle_timeout_minutes": idle_seconds / 60,
        "upscaling_speed": 100,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {**node, "object_store_memory": STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def _wait_for(port: int, head: "subprocess.Popen[bytes]", said: Path) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert head.poll() is None, said.read_text()
        time.sleep(0.1)
    raise AssertionError(said.read_text())


def processes_of(mark: str) -> list[int]:
    """Return the processes whose command line or environment has a text, but for this one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in told and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def lose(node: str) -> None:
    """Kill a node with all that runs on it, at once."""
    for process in processes_of(node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def end(mark: str) -> None:
    """End all processes of a cluster, by their ids."""
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        for process in processes_of(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        time.sleep(2 if number == signal.SIGTERM else 0.5)
