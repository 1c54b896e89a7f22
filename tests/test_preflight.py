"""What a run refuses before anything is paid for, and what it says while nothing runs: the parts that need no Ray."""

from dataclasses import replace
from pathlib import Path

import pytest

from dpt_search import preflight, waiting
from dpt_search.config import BadConfig, RunConfig
from dpt_search.holdings import Holdings
from dpt_search.preflight import Preflight, check_place
from dpt_search.run import configured_run
from dpt_search.stages import WHOLE, trains
from dpt_search.store import RunStore
from dpt_search.waiting import Waiting
from trainables import preflight as on_node
from trainables.preflight import look
from trainables.settings import DataSettings, ModelSettings
from trainables.tasks import LookTask

NPU = {"CPU": 1.0, "NPU": 1.0}


@pytest.fixture
def task(tmp_path: Path, tiny: ModelSettings, table_folder: Path) -> LookTask:
    """A node's task, with the driver's file where it should be."""
    folder = tmp_path / "run" / "preflight" / "one"
    folder.mkdir(parents=True)
    (folder / "driver").write_text("token")
    return LookTask(tiny, DataSettings(str(table_folder)), str(folder), "token", node="n1", driver="head")


def test_a_node_where_all_is_well_says_so_and_leaves_its_file(task: LookTask) -> None:
    found = look(task)
    assert (found["run_dir"], found["unread"]) == ("", [])
    assert Path(task.folder, "n1").read_text() == "token"


def test_a_node_names_versions_without_how_they_were_built(task: LookTask) -> None:
    versions = look(task)["versions"]
    assert set(versions) == {"python", "torch", "timm", "ray"}
    assert "+" not in versions["torch"]


def test_a_node_that_sees_another_folder_says_so(task: LookTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_node, "SEEN_WITHIN_SECONDS", 0.1)
    Path(task.folder, "driver").write_text("of another run")
    assert "does not see what the driver, on head, writes there" in look(task)["run_dir"]


def test_a_node_that_cannot_write_says_so(task: LookTask, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot write to it" in look(replace(task, folder=str(tmp_path / "file" / "preflight")))["run_dir"]


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        (DataSettings("/nowhere/at/all"), ModelSettings("vit"), "nothing at data.path '/nowhere/at/all'"),
        (DataSettings("nonsense://x"), ModelSettings("vit"), "cannot read data.path 'nonsense://x'"),
        (DataSettings("cifar10"), ModelSettings("vit", checkpoint="/no/weights.pt"), "nothing at model.checkpoint"),
        (DataSettings(factory="no_such_module.data"), ModelSettings("vit"), "no module 'no_such_module'"),
    ],
)
def test_a_node_names_what_it_cannot_read(task: LookTask, data: DataSettings, model: ModelSettings, words: str) -> None:
    (problem,) = look(replace(task, data=data, model=model))["unread"]
    assert words in problem


def test_data_that_torchvision_downloads_and_timms_own_weights_are_no_places(task: LookTask) -> None:
    told = replace(task, data=DataSettings("cifar10"), model=ModelSettings("vit", checkpoint="pretrained"))
    assert look(told)["unread"] == []


def test_another_version_on_a_node_is_refused_by_name() -> None:
    checks = Preflight()
    good = {"host": "n1", "unread": [], "versions": preflight.versions()}
    checks._check_node(good)
    bad = {**good, "host": "n2", "versions": {**good["versions"], "timm": "0.9.0"}}
    with pytest.raises(BadConfig, match=r"node n2 has timm 0\.9\.0, but the driver or another node"):
        checks._check_node(bad)


def test_a_driver_without_torch_takes_the_first_nodes_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "versions", lambda: {"python": "3.11"})
    checks = Preflight()
    checks._check_node({"host": "n1", "unread": [], "versions": {"python": "3.11", "torch": "2.13.0"}})
    with pytest.raises(BadConfig, match=r"node n2 has torch 2\.6\.0"):
        checks._check_node({"host": "n2", "unread": [], "versions": {"python": "3.11", "torch": "2.6.0"}})


@pytest.mark.parametrize(
    ("place", "refused"), [("runs/one", True), ("/shared/one", False), ("~/one", False), ("s3://bucket/one", False)]
)
def test_a_job_refuses_a_run_directory_that_would_go_with_it(
    place: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(run_dir=place)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    check_place(config)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    if refused:
        with pytest.raises(BadConfig, match="'runs/one' is relative"):
            check_place(config)
    else:
        check_place(config)


def holdings_of(
    *nodes: dict[str, float], coming: int = 0, refused: tuple[dict[str, float], ...] = (), waits: bool = True
) -> Holdings:
    return Holdings(nodes, free={}, waiting=(NPU,) if waits else (), refused=refused, coming=coming)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (holdings_of({"CPU": 8}), "0 of 0 NPU free); none is being started"),
        (holdings_of({"CPU": 8}, coming=2), "2 more being started"),
        (holdings_of({"CPU": 8, "NPU": 8}), "0 of 8 NPU free); others have the rest"),
        (holdings_of(refused=(NPU,)), "no node is up"),
        (holdings_of(refused=(NPU,)), "the autoscaler has no node type that gives this"),
    ],
)
def test_a_wait_is_told_with_what_is_wanted_held_and_coming(held: Holdings, words: str) -> None:
    told = held.told(NPU)
    assert told.startswith("1 CPU and 1 NPU wanted on one node; ")
    assert words in told


def test_room_is_on_one_node() -> None:
    halves = holdings_of({"CPU": 1}, {"NPU": 1})
    assert not halves.fits(NPU)
    assert holdings_of({"CPU": 1}, {"CPU": 1, "NPU": 1}).fits(NPU)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    return now


def test_a_wait_is_told_after_a_while_and_then_ever_more_seldom(clock: list[float]) -> None:
    lines: list[tuple[float, str]] = []
    wait = Waiting(lambda line: lines.append((clock[0], line)), NPU, lambda: holdings_of({"CPU": 8}))
    for second in range(400):
        clock[0] = second
        wait.look()
    assert [when for when, _ in lines] == pytest.approx([30, 60, 120, 240], abs=waiting.LOOK_SECONDS)
    assert lines[0][1].startswith("nothing has run for 30 s: 1 CPU and 1 NPU wanted")


def test_nothing_is_told_while_something_runs_or_nothing_waits(clock: list[float]) -> None:
    lines: list[str] = []
    for second in range(200):
        clock[0] = second
        if not second:
            busy = Waiting(lines.append, NPU, lambda: holdings_of({"CPU": 8}))
            idle = Waiting(lines.append, NPU, lambda: holdings_of({"CPU": 8}, waits=False))
        if second % 20 == 0:
            busy.runs()
        busy.look()
        idle.look()
    assert lines == []


def test_the_fine_tunes_workers_have_to_fit_while_one_is_to_come(tmp_path: Path) -> None:
    run = configured_run(RunConfig(ModelSettings("m"), DataSettings("p"), run_dir=str(tmp_path)), print)
    assert trains(run, WHOLE)
    assert not trains(run, ("search",))
    run.store.write_json("finetune/finetune.json", {})
    assert not trains(run, WHOLE)
    assert not trains(run, ("finetune",))
    run.config = replace(run.config, baseline=True)
    assert trains(run, WHOLE)
    run.config = replace(run.config, adapt=replace(run.config.adapt, epochs=3))
    assert trains(run, ("dense",))


def test_a_node_that_has_just_joined_is_looked_at_twice_before_it_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, nodes = [], ["first"]

    def look_at(self: Preflight, config: RunConfig, store: RunStore, new: list[str]) -> list[str]:
        looked.append(new)
        if new == ["late"] and looked.count(new) < 2:
            raise BadConfig("not there")
        if new == ["bad"]:
            raise BadConfig("not there")
        return new

    monkeypatch.setattr(Preflight, "_check_nodes", look_at)
    monkeypatch.setattr(preflight, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(preflight, "is_cluster", lambda: True)
    monkeypatch.setattr(preflight, "_await_room", lambda config, wanted, say: None)
    monkeypatch.setattr(preflight, "nodes_that_fit", lambda wanted: nodes)
    check, store = Preflight(), RunStore(str(tmp_path))
    check.check(RunConfig(), store, print)
    nodes.append("late")
    check.check(RunConfig(), store, print)
    nodes.append("bad")
    with pytest.raises(BadConfig):
        check.check(RunConfig(), store, print)
    assert looked == [["first"], ["late"], ["late"], ["bad"], ["bad"]]
    with pytest.raises(BadConfig):
        nodes[:] = ["bad"]
        Preflight().check(RunConfig(), store, print)
    assert len(looked) == 6
