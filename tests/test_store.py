"""The run directory: files written whole, and one line instead of a traceback where it cannot be used."""

import json
import threading
from pathlib import Path

import pytest
from pyarrow import fs

from dpt_search.store import BadRun, RunStore
from trainables import locations


@pytest.fixture(params=["path", "uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    folder = tmp_path / "run"
    return RunStore(str(folder) if request.param == "path" else folder.as_uri())


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make bucket:// URIs a file system that is not the local one, as an object store is; return its folder."""
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    known = fs.FileSystem.from_uri

    def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
        if not uri.startswith("bucket://"):
            return known(uri)
        path = uri.removeprefix("bucket://").partition("?")[0]
        return fs.SubTreeFileSystem(str(bucket), fs.LocalFileSystem()), path

    monkeypatch.setattr(locations, "fs", _Patched(from_uri))
    return bucket


class _Patched:
    """pyarrow.fs with another `from_uri`."""

    LocalFileSystem, FileType = fs.LocalFileSystem, fs.FileType

    def __init__(self, from_uri: object) -> None:
        self.FileSystem = type("FileSystem", (), {"from_uri": staticmethod(from_uri)})


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_written_file_is_read_back_and_no_other_is_left(store: RunStore, tmp_path: Path) -> None:
    store.write("deep/down/file.bin", b"one")
    store.write("deep/down/file.bin", b"two")
    assert store.read("deep/down/file.bin") == b"two"
    assert files_under(tmp_path) == ["run/deep/down/file.bin"]


def test_a_path_and_its_uri_are_the_same_run(tmp_path: Path) -> None:
    RunStore(str(tmp_path / "run")).write_json("run.json", {"a": 1})
    other = RunStore((tmp_path / "run").as_uri())
    assert other.read_json("run.json") == {"a": 1}
    assert other.is_local
    assert other.path("run.json") == str(tmp_path / "run/run.json")


def test_a_relative_run_directory_stays_where_it_was_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = RunStore("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.write("a", b"x")
    assert files_under(tmp_path) == ["run/a"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("file", b"old")

    def disk_full(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(BadRun, match="No space left on device"):
        store.write("file", b"new")
    assert store.read("file") == b"old"
    assert files_under(tmp_path) == ["run/file"]


def test_a_reader_sees_the_old_file_or_the_new_one_never_a_part(store: RunStore) -> None:
    contents = {bytes([letter]) * 300_000 for letter in b"abcdef"}
    store.write("file", min(contents))
    done = threading.Event()

    def write() -> None:
        for content in sorted(contents) * 5:
            store.write("file", content)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not done.is_set() or not seen:
        assert store.read("file") in contents
        seen += 1
    writer.join()


def test_what_is_not_there_is_no_error(store: RunStore) -> None:
    assert store.read_json("run.json") is None
    assert store.names("trials") == []
    assert not store.exists("run.json")
    store.delete("run.json")
    store.delete_dir("trials")
    with pytest.raises(FileNotFoundError):
        store.read("run.json")


def test_asking_creates_nothing(store: RunStore, tmp_path: Path) -> None:
    store.read_json("run.json")
    store.names("trials")
    store.exists("trials")
    assert list(tmp_path.iterdir()) == []


def test_names_are_the_files_of_a_folder_sorted(store: RunStore) -> None:
    for name in ("b", "a", "c/d"):
        store.write(f"folder/{name}", b"")
    assert store.names("folder") == ["a", "b"]
    store.delete("folder/a")
    assert store.names("folder") == ["b"]
    store.delete_dir("folder")
    assert not store.exists("folder")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1}}'])
def test_unreadable_json_is_one_line_that_names_the_file(store: RunStore, content: bytes) -> None:
    store.write("ranking.json", content)
    with pytest.raises(BadRun, match=r"ranking\.json is not readable JSON: remove it") as caught:
        store.read_json("ranking.json")
    assert "\n" not in str(caught.value)


def test_json_that_is_no_json_is_not_written(store: RunStore) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json("a.json", {"loss": float("nan")})
    assert not store.exists("a.json")


@pytest.mark.parametrize("as_uri", [False, True])
def test_a_run_directory_that_cannot_be_written_is_refused_by_name(tmp_path: Path, as_uri: bool) -> None:
    (tmp_path / "file.txt").write_text("in the way")
    folder = tmp_path / "file.txt/run"
    store = RunStore(folder.as_uri() if as_uri else str(folder))
    with pytest.raises(BadRun, match=r"cannot write .*file\.txt/run.*--run-dir") as caught:
        store.write_json("run.json", {})
    assert "\n" not in str(caught.value)


def test_a_run_directory_below_a_file_is_refused_by_name_on_reading_too(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("in the way")
    store = RunStore(str(tmp_path / "file.txt/run"))
    with pytest.raises(BadRun, match=r"cannot read from .*file\.txt/run.*--run-dir") as caught:
        store.read_json("run.json")
    assert "\n" not in str(caught.value)
    assert not store.exists("run.json")


@pytest.mark.parametrize("location", ["nosuch://bucket/run", "s3:///", "file://other-host/run"])
def test_a_file_system_that_cannot_be_reached_is_one_line(location: str) -> None:
    with pytest.raises(BadRun, match="run directory: cannot open") as caught:
        RunStore(location)
    assert "\n" not in str(caught.value)


def test_a_run_on_another_file_system_is_read_written_and_listed(object_store: Path) -> None:
    store = RunStore("bucket://runs/one/")
    store.write_json("run.json", {"a": 1})
    store.write_json("trials/a.json", {})
    assert not store.is_local
    assert store.path("run.json") == "bucket://runs/one/run.json"
    assert locations.read_bytes(store.path("run.json")) == store.read("run.json")
    assert json.loads((object_store / "runs/one/run.json").read_text()) == {"a": 1}
    assert store.names("trials") == ["a.json"]
    assert files_under(object_store) == ["runs/one/run.json", "runs/one/trials/a.json"]


def test_a_uri_with_options_is_refused_because_names_are_put_after_it(object_store: Path) -> None:
    with pytest.raises(BadRun, match=r"endpoint_override=localhost.*AWS_ENDPOINT_URL"):
        RunStore("bucket://runs/one?endpoint_override=localhost:9000")
    assert files_under(object_store) == []
