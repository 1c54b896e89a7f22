"""What goes with a job, and how `submit` is written: the parts that need no cluster."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from clusters import free_ports

from dpt_search.cli import main
from dpt_search.config import BadConfig
from dpt_search.submit import packed

VERBS = ("dpt_search", "trainables", "search_spaces")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "run.yaml"
    path.write_text("seed: 3\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job").mkdir()
    return tmp_path / "job"


@pytest.mark.parametrize("joined", [False, True])
def test_the_packages_and_the_configuration_go_with_a_job_and_nothing_else(
    config: Path, folder: Path, joined: bool
) -> None:
    given = [f"--config={config}"] if joined else ["--config", str(config)]
    argv = packed(["run", *given, "--run-dir", "s3://bucket/one"], [], folder)
    assert argv == [
        "run",
        *(["--config=run.yaml"] if joined else ["--config", "run.yaml"]),
        "--run-dir",
        "s3://bucket/one",
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*VERBS, "run.yaml"])
    assert not list(folder.rglob("__pycache__"))
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 20 * 2**20


def test_the_program_runs_from_what_goes_with_a_job(config: Path, folder: Path, tmp_path: Path) -> None:
    argv = packed(["run", "--config", str(config)], [], folder)
    with zipfile.ZipFile(tmp_path / "job.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
    with zipfile.ZipFile(tmp_path / "job.zip") as archive:
        archive.extractall(tmp_path / "there")
    done = subprocess.run(
        [sys.executable, "-m", "dpt_search", *argv, "--model.name", ""], cwd=tmp_path / "there", env={},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("dpt-search: model.name is missing")


def test_what_the_user_names_goes_with_a_job(config: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text("")
    (tmp_path / "more" / "__pycache__").mkdir(parents=True)
    packed(["run"], [str(tmp_path / "my_data.py"), str(tmp_path / "more")], folder)
    assert (folder / "my_data.py").is_file()
    assert list((folder / "more").iterdir()) == []


@pytest.mark.parametrize("given", ['{"seed": 3}', "s3://bucket/run.yaml"])
def test_a_configuration_that_is_no_file_here_stays_as_it_is(given: str, folder: Path) -> None:
    assert packed(["run", "--config", given], [], folder) == ["run", "--config", given]


def test_two_files_of_one_name_are_refused(config: Path, folder: Path) -> None:
    with pytest.raises(BadConfig, match="rename it"):
        packed(["run", "--config", str(config)], [str(config)], folder)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "name what the job is to do"),
        (["--follow", "job1", "run"], "name what the job is to do"),
        (["--", "rum"], "no verb 'rum'"),
        (["run", "--config", "/no/run.yaml"], "--config /no/run.yaml is not there"),
        (["run", "--run-dir", "runs/one"], "'runs/one' is relative"),
        (["--", "run", "--run-dir=runs/one"], "'runs/one' is relative"),
        (["--pack", "/no/data.py", "run"], "--pack /no/data.py is not there"),
        (["--adress", "x", "run"], "--adress"),
        (["--address", "http://127.0.0.1:x", "run"], "no job server of Ray answers at http://127.0.0.1:x"),
    ],
)
def test_what_is_wrong_is_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *argv]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
def test_an_address_where_nobody_is_is_one_line_at_once(form: str) -> None:
    address = form.format(*free_ports(1))
    done = subprocess.run(
        [sys.executable, "-m", "dpt_search", "submit", "--address", address, "run"], capture_output=True, text=True,
        timeout=20,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"no job server of Ray answers at http://{address.removeprefix('http://')}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_client_loads_without_torch() -> None:
    code = "import dpt_search.submit, ray.job_submission, sys; print('torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n"
