"""What is installed: three packages and all they need at run time, in a wheel of modest size."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("dpt_search", "trainables", "search_spaces")
LARGEST = 20 * 2**20


def copy_of_what_is_shipped(to: Path) -> Path:
    """Copy the checkout's files, with those that git does not know yet and without those that it ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and name.partition("/")[0] not in ("tests", "docs", "examples", "benchmarks"):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    source, out = copy_of_what_is_shipped(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def metadata(wheel: Path, file: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(f".dist-info/{file}")]
        return archive.read(name).decode()


pytestmark = pytest.mark.timeout(180)


def test_the_wheel_has_the_three_packages_and_nothing_else(names: list[str]) -> None:
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    assert len(top) == len(PACKAGES) + 1


def test_the_wheel_has_every_module(names: list[str]) -> None:
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


@pytest.mark.parametrize(
    "file",
    [
        *(f"dpt_search/embedded/fashion_mnist/{split}.parquet" for split in ("train", "probe", "val", "test")),
        "dpt_search/embedded/fashion_mnist/dense.safetensors",
        "dpt_search/embedded/fashion_mnist/run.yaml",
        "dpt_search/report.html.jinja",
        *(f"{package}/py.typed" for package in PACKAGES),
    ],
)
def test_the_wheel_has_what_is_no_module_but_needed(names: list[str], file: str) -> None:
    assert file in names


def test_the_wheel_has_every_embedded_file(names: list[str]) -> None:
    embedded = [path for path in (ROOT / "dpt_search/embedded").rglob("*") if path.is_file()]
    assert {str(path.relative_to(ROOT)) for path in embedded} <= set(names)


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < LARGEST


def test_the_program_and_its_version_are_in_the_metadata(wheel: Path) -> None:
    import dpt_search

    assert "dpt-search = dpt_search.cli:entry" in metadata(wheel, "entry_points.txt")
    assert f"\nVersion: {dpt_search.__version__}\n" in metadata(wheel, "METADATA")
