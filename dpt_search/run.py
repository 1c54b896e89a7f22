"""A run: its configuration, its directory, and the rule by which a stage is skipped."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dpt_search.config import LATER, RunConfig, check, check_same_run, identity
from dpt_search.preflight import Preflight
from dpt_search.remote import call, ray_session, resources
from dpt_search.store import BadRun, RunStore
from dpt_search.waiting import Waiting
from search_spaces.plan import Ranking
from trainables.preflight import installed
from trainables.settings import ModelSettings
from trainables.tasks import Task, TrialTask

PACKAGES = ("dpt-search", "torch", "timm", "ray", "optuna", "pyarrow", "numpy")


class Session:
    """Ray, started or joined at most once, by whoever needs it first."""

    def __init__(self) -> None:
        self._open, self._started, self._preflight = ExitStack(), False, Preflight()

    def start(self, run: Run) -> None:
        """Start or join Ray, unless that was done, and look at the nodes that were not looked at yet."""
        if not self._started:
            run.say("starting Ray")
            self._open.enter_context(ray_session())
            self._started = True
        self._preflight.check(run.config, run.store, run.say)
        if run.finetunes:
            self._preflight.check_workers(run.config, run.say)

    def close(self) -> None:
        """Leave it."""
        self._open.close()


@dataclass
class Run:
    """One run as the stages see it.

    Attributes:
        config: checked configuration.
        store: the run directory.
        say: prints a line for the user.
        reseed: added to the seed of sampler, trials and probe, for searches that are to differ by chance alone: the
            data stay those of the seed.
        session: Ray, which several runs may share.
        finetunes: whether the long fine-tune is to come, whose workers have to fit.
    """

    config: RunConfig
    store: RunStore
    say: Callable[[str], None]
    reseed: int = 0
    session: Session = field(default_factory=Session)
    finetunes: bool = False

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def start_ray(self) -> None:
        """Start or join Ray, once; it is left when the run is."""
        self.session.start(self)

    def call(
        self,
        target: str,
        *args: Any,
        cpus: float = 1,
        devices: float = 1.0,
        on_wait: Callable[[], None] = lambda: None,
        waits_for: dict[str, float] | None = None,
    ) -> Any:
        """Call a function on a worker (see `remote.call`), which may itself wait for others of these resources."""
        self.start_ray()
        waits = [Waiting(self.say, each) for each in (resources(self.config, cpus, devices), waits_for) if each]

        def look() -> None:
            on_wait()
            for waiting in waits:
                waiting.look()

        return call(self.config, target, *args, cpus=cpus, devices=devices, on_wait=look)

    @property
    def resources(self) -> dict[str, float]:
        """Ray resources of one trial."""
        return resources(self.config, self.config.cpus_per_trial, self.config.devices_per_trial)

    @property
    def finetune_resources(self) -> dict[str, float]:
        """Ray resources of the probe and of one worker of the long fine-tune: those cannot share an accelerator."""
        return resources(self.config, self.config.cpus_per_trial, 1.0)

    @property
    def model(self) -> ModelSettings:
        """The dense model of all stages after the first: the adapted one, if it was adapted."""
        if not self.config.adapt.epochs:
            return self.unadapted
        return replace(self.config.model, checkpoint=self.store.path("dense/model.safetensors"), new_head=False)

    @property
    def unadapted(self) -> ModelSettings:
        """The dense model before it is adapted: the user's, or that with its gates absorbed."""
        if self.config.model.gated == "keep":
            return self.config.model
        return replace(self.config.model, checkpoint=self.store.path("dense/absorbed.safetensors"), new_head=False)

    @property
    def start_weights(self) -> str:
        """Where the weights are that trials and the long fine-tune start from; empty for the dense model's own."""
        return self.store.path("probe/model.safetensors") if self.config.start == "probe" else ""

    def task(self, threads: int = 1) -> dict[str, Any]:
        """Return what every stage on a worker is told, as keyword arguments of its task."""
        return {
            "model": self.model,
            "data": self.config.data,
            "seed": self.config.seed,
            "device": self.config.device,
            "threads": threads,
            "attention": self.config.attention,
        }

    def trial_task(self, threads: int, checkpoints: str, timeout: float = 0.0) -> TrialTask:
        """Return what workers are told of every trial.

        Args:
            threads: of a trial.
            checkpoints: place in the run directory for the states of running trials.
            timeout: seconds after which a trial fails; 0 for no limit.
        """
        place, recipe = self.store.path(checkpoints), self.config.trial
        return TrialTask(
            **self.task(threads), recipe=recipe, checkpoints=place, timeout=timeout, start=self.start_weights
        )

    def stage(self, name: str, inputs: Any, output: str, work: Callable[[str], None]) -> bool:
        """Do a stage's work, unless its output is there and its inputs have not changed.

        Args:
            name: the stage.
            inputs: plain data that the result depends on.
            output: a file the work writes; `work` runs when it is missing.
            work: does it; is given the inputs' digest.

        Returns:
            Whether the work was done now.
        """
        if self.is_done(name, inputs, output):
            self.say(f"{name}: already done")
            return False
        start = time.monotonic()
        work(digest_of(inputs))
        self.record(name, inputs, time.monotonic() - start)
        return True

    def is_done(self, name: str, inputs: Any, output: str) -> bool:
        """Say whether a stage's output is there, made from these inputs."""
        done = self.store.read_json(f"stages/{name}.json")
        return done is not None and done["inputs"] == digest_of(inputs) and self.store.exists(output)

    def record(self, name: str, inputs: Any, seconds: float) -> None:
        """Record that a stage was done."""
        stamp = f"stages/{name}.json"
        done = self.store.read_json(stamp)
        # A stage that goes on (more trials, say) adds to the time it took before.
        earlier = done["seconds"] if done is not None and name == "search" else 0.0
        self.store.write_json(
            stamp,
            {
                "stage": name,
                "inputs": digest_of(inputs),
                "seconds": earlier + seconds,
                "finished_at": time.time(),
            },
        )


def digest_of(inputs: Any) -> str:
    """Return a short digest of plain data."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def identity_of(config: RunConfig) -> dict[str, Any]:
    """Return what the dense model, the ranking and the trials depend on, sorted."""
    found = identity(config)
    return {name: found[name] for name in sorted(found) if name not in LATER or found[name] != LATER[name]}


def open_run(config: RunConfig, say: Callable[[str], None]) -> Run:
    """Check the configuration, against the run directory's too, and record it.

    Raises:
        BadConfig: the configuration cannot be used, or is that of another run.
        BadRun: the run directory cannot be written to.
    """
    check(config)
    store = RunStore(config.run_dir)
    recorded = store.read_json("run.json")
    # Until a stage is done, nothing depends on what was recorded: a mistyped model may be put right.
    if recorded is not None and store.names("stages"):
        check_same_run(recorded["config"], config)
    store.write_json(
        "run.json",
        {
            "config": asdict(config),
            "versions": versions(),
            "commit": commit(),
            "created": recorded["created"] if recorded is not None else time.time(),
            "command": " ".join(sys.argv),
        },
    )
    return Run(config, store, say)


def recorded_run(location: str, say: Callable[[str], None]) -> Run:
    """Open a run directory as it is, for reading.

    Raises:
        BadRun: it is no run directory.
    """
    store = RunStore(location)
    recorded = store.read_json("run.json")
    if recorded is None:
        raise BadRun(f"{location!r} is no run directory: it has no run.json")
    names = ("seed", "budget", "finetune_budget", "prior", "max_attn", "max_act")
    known = {name: recorded["config"][name] for name in names if name in recorded["config"]}
    return Run(replace(RunConfig(), run_dir=location, **known), store, say)


def configured_run(config: RunConfig, say: Callable[[str], None]) -> Run:
    """Open a run directory to add to it, its own record left as it is.

    Raises:
        BadConfig: the configuration cannot be used.
    """
    check(config)
    return Run(config, RunStore(config.run_dir), say)


def base_task(run: Run) -> Task:
    """Return the task of a stage that needs no more than the dense model and the data."""
    return Task(**run.task())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, as installed here."""
    return {"python": sys.version.split()[0], **installed(PACKAGES)}


def commit() -> str:
    """Return the checkout's commit, or nothing where there is no checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def read_ranking(run: Run) -> Ranking:
    """Return the run's ranking.

    Raises:
        BadRun: there is none yet.
    """
    found = run.store.read_json("ranking.json")
    if found is None:
        raise BadRun(f"no ranking in {run.store.location!r} yet: run `dpt-search rank` on it first")
    return Ranking(tuple(found["attn"]), tuple(found["act"]))


def read_dense_accuracy(run: Run) -> float | None:
    """Return the dense model's accuracy on val; None while it is not known, or where trials do not start from it."""
    if run.config.start != "dense":
        return None
    found: float | None = (run.store.read_json("dense/dense.json") or {}).get("accuracy")
    return found
