"""What this machine and a model can do, checked one by one in fresh processes, so that a broken part breaks nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dpt_search.run import versions

_CHECKS = {
    "torch": "import torch; print(torch.__version__, f'with {torch.get_num_threads()} threads')",
    "timm": (
        "from search_spaces.timm_compat import timm; print(timm.__version__, f'with {len(timm.list_models())} models')"
    ),
    "ray": "import ray; print(ray.__version__)",
}
_DEVICE = "from trainables.devices import describe, torch_device; d = torch_device({name!r}); print(describe(d))"
_MODEL = """
from search_spaces import family_of
from search_spaces.timm_compat import timm
if not timm.is_model({name!r}):
    raise SystemExit("timm has no model " + {name!r})
model = timm.create_model({name!r})
units = family_of(model).units(model)
kinds = [u.kind for u in units]
print(f"{{type(model).__name__}} with {{kinds.count('attn')}} attn and {{kinds.count('act')}} act units")
"""


def examine(model: str) -> Iterator[tuple[str, bool]]:
    """Yield one finding after another, each with whether it is as it should be.

    Args:
        model: timm name of a model to look at; empty for none.
    """
    found = versions()
    yield ", ".join(f"{name} {version}" for name, version in found.items()), True
    yield f"{os.cpu_count()} CPU cores, {shutil.disk_usage('.').free / 2**30:.0f} GiB of disk free here", True
    for name, code in _CHECKS.items():
        yield _line(name, code)
    yield _line("device cpu", _DEVICE.format(name="cpu"))
    for name in ("cuda", "npu"):
        text, ok = _line(f"device {name}", _DEVICE.format(name=name))
        yield (text if ok else f"device {name}: none on this machine"), True
    if model:
        yield _line(f"model {model}", _MODEL.format(name=model))


def _line(what: str, code: str) -> tuple[str, bool]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), *sys.path]))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return f"{what}: {done.stdout.strip()}", True
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"{what}: {reason}", False
