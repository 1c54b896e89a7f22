"""What end-to-end tests share: small parts of the embedded example, the program started as a user does, and killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dpt_search.store import RunStore, TrialLog
from trainables.locations import resolve

EMBEDDED = Path(resolve("package:dpt_search/embedded/fashion_mnist")[1])


def embedded_part(folder: Path, sizes: dict[str, int], **changes: object) -> Path:
    """Write so many of the embedded images a split, and a configuration for them: the embedded one, changed."""
    for split, size in sizes.items():
        table = pq.read_table(EMBEDDED / f"{split}.parquet")
        labels = table["label"].to_numpy()
        chosen = np.concatenate([np.flatnonzero(labels == k)[: size // 10] for k in range(10)])
        pq.write_table(table.take(pa.array(np.sort(chosen))), folder / f"{split}.parquet")
    config = yaml.safe_load((EMBEDDED / "run.yaml").read_text())
    config["data"] |= {"path": str(folder), "cache_dir": str(folder / "cache")}
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    del config["run_dir"]
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dpt_search", *map(str, arguments)]


def dpt_search(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(*arguments), capture_output=True, text=True)


def outcomes(run: Path | str) -> list[tuple[str, list[float]]]:
    log = TrialLog(RunStore(str(run)))
    return [(log.finished[n].plan, log.finished[n].accuracies) for n in sorted(log.finished)]


def killed_when(start: list[str], condition: Callable[[], object]) -> None:
    """Start a driver, and kill -9 it, and all it started, once the condition holds."""
    driver = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until(condition, driver)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def wait_until(condition: Callable[[], object], driver: "subprocess.Popen[str]") -> None:
    for _ in range(2400):
        if condition():
            return
        assert driver.poll() is None, "the driver ended before the condition held"
        time.sleep(0.05)
    raise AssertionError("the condition never held")


def interrupted_when(condition: Callable[[], object], driver: "subprocess.Popen[str]") -> tuple[str, str]:
    """Press Ctrl-C once the condition holds; return what the driver said until its end, of both streams."""
    try:
        wait_until(condition, driver)
        driver.send_signal(signal.SIGINT)
        said, complained = driver.communicate(timeout=100)
    finally:
        driver.kill()
    return said, complained


def workers_of(session: int) -> list[int]:
    """Processes of a session that run trials."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, group = (folder / "cmdline").read_bytes(), os.getsid(int(folder.name))
        except (OSError, ProcessLookupError):
            continue
        if group == session and b"ray::" in name and b"Trainable" in name:
            found.append(int(folder.name))
    return found
