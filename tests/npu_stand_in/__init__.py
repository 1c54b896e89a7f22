"""Folders for PYTHONPATH that make a machine without an NPU look like one with them, or like one that lacks something.

`torch_npu/` beside this file stands in for Huawei's package, `acl.py` for the module that Ray counts NPUs with, and
`device.cpp` is the device itself. Nothing here is imported by what is tested: it is put into a folder of its own, which
is named in PYTHONPATH, as if it were installed.
"""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
TORCH = metadata.version("torch").split("+")[0]

_BUILD = """
import sys
from torch.utils.cpp_extension import load
load("_C", [sys.argv[1]], build_directory=sys.argv[2], extra_cflags=["-O1"], is_python_module=False)
"""
MISSING_SHARED_LIBRARY = "libascendcl.so: cannot open shared object file: No such file or directory"


def use(folder: str) -> None:
    """Make this process, which has not imported torch yet, one of the host whose packages are in a folder."""
    sys.path.insert(0, folder)


def tools_missing() -> str:
    """Say which of the tools that build the device are not on this machine; empty where all are."""
    return ", ".join(tool for tool in (os.environ.get("CXX", "c++"), "ninja") if shutil.which(tool) is None)


def install(folder: Path, npus: int = 2) -> Path:
    """Build the device, in about half a minute, and put all that a host with NPUs has into a folder."""
    package = folder / "torch_npu"
    shutil.copytree(HERE / "torch_npu", package, ignore=shutil.ignore_patterns("__pycache__"))
    built = folder.parent / f"{folder.name}_built"
    built.mkdir()
    source = str(HERE / "device.cpp")
    subprocess.run([sys.executable, "-c", _BUILD, source, str(built)], check=True, capture_output=True)
    shutil.copy(built / "_C.so", package)
    shutil.copy(HERE / "acl.py", folder)
    return describe(folder, TORCH, npus)


def describe(folder: Path, version: str, npus: int = 0) -> Path:
    """Write what pip would leave of `torch_npu`, and how many NPUs there are to be found."""
    about = folder / f"torch_npu-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (about / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    if npus:
        (folder / "npus.txt").write_text(str(npus))
    return folder


def with_npus(host: Path, folder: Path, npus: int) -> Path:
    """Copy what `install` made, for a host with another number of NPUs."""
    shutil.copytree(host, folder)
    (folder / "npus.txt").write_text(str(npus))
    return folder


def install_broken(folder: Path, code: str, version: str = TORCH, npus: int = 0) -> Path:
    """Put a `torch_npu` of one file into a folder."""
    package = folder / "torch_npu"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    if npus:
        shutil.copy(HERE / "acl.py", folder)
    return describe(folder, version, npus)


def install_without_driver(folder: Path) -> Path:
    """Put a `torch_npu` into a folder that fails as Huawei's does without CANN; a file `tried` tells that it was."""
    trace = f"import pathlib; pathlib.Path({str(folder / 'tried')!r}).touch()"
    return install_broken(folder, f"{trace}\nraise ImportError({MISSING_SHARED_LIBRARY!r})\n")


def install_cards_only(folder: Path, npus: int = 1) -> Path:
    """Put into a folder what a host has whose NPUs Ray sees, but where nobody installed `torch_npu`."""
    folder.mkdir(parents=True)
    shutil.copy(HERE / "acl.py", folder)
    (folder / "npus.txt").write_text(str(npus))
    return folder
