"""The files of `cluster/`: what reads them would take them as they are."""

import copy
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from trainables.devices import DEVICES

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "cluster"
FIELDS = yaml.safe_load((ROOT / "tests" / "kuberay_v1_fields.yaml").read_text())
MANIFESTS = sorted(FOLDER.glob("kuberay-*.yaml"))
LAUNCHED = sorted(set(FOLDER.glob("*.yaml")) - set(MANIFESTS))
DOCUMENTS = [*LAUNCHED, *MANIFESTS, *(FOLDER / "README.md", ROOT / "docs" / "clusters.md", ROOT / "README.md")]
CARDS = {"nvidia.com/gpu": "GPU", "huawei.com/Ascend910": "NPU"}
"""Kubernetes' names of accelerators, and Ray's."""
RESOURCES = {device.resource for device in DEVICES.values()}
SECRET_NAME = re.compile(r"token|secret|passw|credential|access_?key|api_?key", re.IGNORECASE)
SECRET_TEXT = re.compile(
    r"AKIA[0-9A-Z]{12,}|-----BEGIN|://[^/\s:@]+:[^/\s@]+@"
    r"|(?:secret|passw\w*|access_?key\w*|api_?key|auth_?token)\s*[:=]\s*[\"']?[A-Za-z0-9+/_-]{8,}",
    re.IGNORECASE,
)

Tree = dict[str, Any]
Change = Callable[[Tree], object]


def read(name: str) -> Tree:
    tree: Tree = yaml.safe_load((FOLDER / name).read_text())
    return tree


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_a_file_for_every_kind_of_cluster() -> None:
    assert [path.name for path in LAUNCHED] == ["aws-gpu.yaml", "on-premise-gpu.yaml", "on-premise-npu.yaml"]
    assert [path.name for path in MANIFESTS] == [
        f"kuberay-{device}-{kind}.yaml" for device in ("ascend", "gpu") for kind in ("cluster", "job")
    ]


# What `ray up` reads: its own checks.


def check_launched(config: Tree) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


@pytest.mark.parametrize("path", LAUNCHED, ids=named)
def test_ray_up_takes_the_file(path: Path) -> None:
    check_launched(read(path.name))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("aws-gpu.yaml", lambda tree: tree.update(max_worker=2)),
        ("aws-gpu.yaml", lambda tree: tree.update(idle_timeout_minutes="five")),
        ("aws-gpu.yaml", lambda tree: tree["available_node_types"]["gpu"].update(min_worker=1)),
        ("on-premise-npu.yaml", lambda tree: tree["docker"].update(images="x")),
    ],
)
def test_ray_up_would_refuse_a_misspelt_file(name: str, change: Change) -> None:
    tree = read(name)
    change(tree)
    with pytest.raises(jsonschema.ValidationError):
        check_launched(tree)


def test_the_cloud_grows_from_no_node_of_spot_gpus_and_its_head_runs_no_task() -> None:
    tree = read("aws-gpu.yaml")
    head, gpu = (tree["available_node_types"][name] for name in ("head", "gpu"))
    assert tree["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, tree["max_workers"])
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"]


# What KubeRay's operator reads: the fields of its published definitions.


def wrong_fields(tree: Tree) -> list[str]:
    """Return what the operator would refuse or ignore, each with its place."""
    spec = tree["spec"]
    if tree["kind"] == "RayJob":
        return [*_unknown("RayJob", spec), *_wrong_in_cluster(spec.get("rayClusterSpec", {}))]
    return list(_wrong_in_cluster(spec))


def _wrong_in_cluster(spec: Tree) -> Iterator[str]:
    yield from _unknown("RayCluster", spec)
    for name in ("authOptions", "autoscalerOptions", "headGroupSpec"):
        yield from _unknown(name, spec.get(name, {}))
    groups = spec.get("workerGroupSpecs", [])
    for group in groups:
        yield from _unknown("workerGroupSpecs", group)
    for group in [spec.get("headGroupSpec", {}), *groups]:
        started = group.get("rayStartParams", {})
        yield from (f"rayStartParams.{name} is no string" for name in started if not isinstance(started[name], str))
        pod = group.get("template", {}).get("spec", {})
        yield from _unknown("pod", pod)
        for container in pod.get("containers", []):
            yield from _unknown("container", container)
        # The second version of the autoscaler demands it.
        if spec.get("autoscalerOptions", {}).get("version") == "v2" and pod.get("restartPolicy") != "Never":
            yield "restartPolicy is not Never"


def _unknown(place: str, fields: Tree) -> Iterator[str]:
    yield from (f"{place} has no field {name}" for name in fields if name not in FIELDS[place])
    yield from (f"{place} lacks {name}" for name in FIELDS["required"].get(place, []) if name not in fields)
    for name, allowed in FIELDS["values"].items():
        if name in fields and fields[name] not in allowed:
            yield f"{place}.{name} is {fields[name]}"


def cluster_of(tree: Tree) -> Tree:
    spec: Tree = tree["spec"]
    return spec["rayClusterSpec"] if tree["kind"] == "RayJob" else spec


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_the_operator_knows_every_field_and_scales_from_nothing(path: Path) -> None:
    tree = read(path.name)
    assert tree["apiVersion"] == "ray.io/v1"
    assert tree["kind"] == ("RayJob" if path.stem.endswith("job") else "RayCluster")
    assert wrong_fields(tree) == []
    spec = cluster_of(tree)
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree["spec"].update(ttlSecondsAfterFinish=1), "RayJob has no field ttlSecondsAfterFinish"),
        (lambda tree: tree["spec"].update(submissionMode="Job"), "RayJob.submissionMode is Job"),
        (lambda tree: cluster_of(tree)["autoscalerOptions"].update(version="2"), "autoscalerOptions.version is 2"),
        (lambda tree: cluster_of(tree)["headGroupSpec"].pop("template"), "headGroupSpec lacks template"),
        (
            lambda tree: cluster_of(tree)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
            "rayStartParams.num-cpus is no string",
        ),
        (
            lambda tree: cluster_of(tree)["workerGroupSpecs"][0].update(maxReplica=3),
            "workerGroupSpecs has no field maxReplica",
        ),
        (
            lambda tree: cluster_of(tree)["workerGroupSpecs"][0]["template"]["spec"].update(restartPolicy="Always"),
            "restartPolicy is not Never",
        ),
        (
            lambda tree: cluster_of(tree)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(limits={}),
            "container has no field limits",
        ),
    ],
)
def test_an_error_in_a_manifest_is_seen(change: Change, said: str) -> None:
    tree = read("kuberay-gpu-job.yaml")
    change(tree)
    assert said in wrong_fields(tree)


# Resources: what Ray is told to count is what the program asks for.


def resources_of(tree: Tree) -> set[str]:
    """Return the names of Ray's resources, and of Kubernetes' accelerators, that a file gives to its workers."""
    found: set[str] = set()
    for kind in tree.get("available_node_types", {}).values():
        found |= set(kind["resources"])
    for line in tree.get("worker_start_ray_commands", []):
        for option in shlex.split(line):
            if option.startswith("--resources="):
                found |= set(json.loads(option.partition("=")[2]))
    for group in cluster_of(tree).get("workerGroupSpecs", []) if "spec" in tree else []:
        # The operator puts the value into a shell's command line.
        [told] = shlex.split(group["rayStartParams"].get("resources", "{}"))
        found |= set(json.loads(json.loads(f'"{told}"') if told.startswith("{\\") else told))
        for container in group["template"]["spec"]["containers"]:
            found |= {CARDS.get(name, name) for name in container["resources"]["limits"] if "/" in name}
    return found


@pytest.mark.parametrize("path", [*LAUNCHED, *MANIFESTS], ids=named)
def test_resources_are_those_that_the_devices_need(path: Path) -> None:
    found = resources_of(read(path.name))
    assert found <= RESOURCES
    # On a host of one's own Ray counts CPUs and GPUs by itself.
    wanted = {"ascend": {"NPU"}, "npu": {"NPU"}, "gpu": set() if path.stem == "on-premise-gpu" else {"GPU"}}
    assert found >= next(wanted[part] for part in path.stem.split("-") if part in wanted)


def test_a_resource_that_no_device_needs_is_seen() -> None:
    tree = read("on-premise-npu.yaml")
    last = tree["worker_start_ray_commands"]
    assert resources_of(tree) == {"NPU"}
    last[-1] = last[-1].replace("NPU", "npu")
    assert not resources_of(tree) <= RESOURCES
    tree = read("kuberay-ascend-job.yaml")
    limits = cluster_of(tree)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    limits["huawei.com/Ascend"] = limits.pop("huawei.com/Ascend910")
    assert not resources_of(tree) <= RESOURCES


# Nothing that must be kept to oneself, and no door that is open to the world.


def secrets_in(text: str, tree: Any) -> list[str]:
    """Return what looks like a secret itself, where a reference should stand."""
    found = [match[0] for match in SECRET_TEXT.finditer(text)]
    for entry in _mappings(tree):
        if SECRET_NAME.search(str(entry.get("name", ""))) and "value" in entry:
            found.append(str(entry["name"]))
    return found


def _mappings(tree: Any) -> Iterator[Tree]:
    if isinstance(tree, dict):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _mappings(value)


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_no_file_has_a_secret_in_it(path: Path) -> None:
    text = path.read_text()
    assert secrets_in(text, yaml.safe_load(text) if path.suffix == ".yaml" else None) == []


@pytest.mark.parametrize(
    "planted",
    [
        "env: [{name: AWS_SECRET_ACCESS_KEY, value: abc}]",
        "aws_secret_access_key: wJalrXUtnFEMIK7MDENGbPxRfiCY",
        "export AUTH_TOKEN=0123456789abcdef",
        "key: AKIAIOSFODNN7EXAMPLE",
        "run_dir: s3://user:hunter22@bucket/runs",
    ],
)
def test_a_secret_is_seen(planted: str) -> None:
    assert secrets_in(planted, yaml.safe_load(planted) if ": " in planted else None)


def open_doors(tree: Tree) -> list[str]:
    """Return what would let others than the cluster's own reach the dashboard or the job server."""
    found = [
        line
        for line in [*tree.get("head_start_ray_commands", []), *tree.get("worker_start_ray_commands", [])]
        if " ray start --head" in line and "--dashboard-host=127.0.0.1" not in line
    ]
    if "spec" in tree:
        head = cluster_of(tree)["headGroupSpec"]
        found += [f"serviceType {head.get('serviceType')}"] if head.get("serviceType") != "ClusterIP" else []
        found += ["enableIngress"] if head.get("enableIngress", False) else []
        found += ["no token"] if cluster_of(tree).get("authOptions") != {"mode": "token"} else []
    else:
        lines = [*tree["head_start_ray_commands"], *tree["worker_start_ray_commands"]]
        found += [line for line in lines if " ray start " in line and "RAY_AUTH_MODE=token" not in line]
    return found


@pytest.mark.parametrize("path", [*LAUNCHED, *MANIFESTS], ids=named)
def test_the_dashboard_is_not_open_to_the_world(path: Path) -> None:
    assert open_doors(read(path.name)) == []


def test_an_open_door_is_seen() -> None:
    tree = read("aws-gpu.yaml")
    tree["head_start_ray_commands"][-1] = tree["head_start_ray_commands"][-1].replace("127.0.0.1", "0.0.0.0")
    assert open_doors(tree)
    tree = read("kuberay-gpu-cluster.yaml")
    tree["spec"]["headGroupSpec"]["serviceType"] = "LoadBalancer"
    assert open_doors(tree) == ["serviceType LoadBalancer"]
