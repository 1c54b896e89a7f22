"""What a stage on a worker is told: frozen, torch-free, made by the driver and sent as it is."""

from dataclasses import dataclass

from search_spaces.plan import Attention, Ranking
from search_spaces.ratios import Cell
from trainables.settings import DataSettings, ModelSettings, Recipe

TRAINING_FORWARDS = 3
"""MACs of a training step over those of a forward pass: forward, and twice as much backward."""
FORMATS = {"safetensors": "model.safetensors", "pt2": "model.pt2", "onnx": "model.onnx"}
"""Export formats, and the file that each one's weights are in."""


@dataclass(frozen=True)
class Task:
    """What every stage is told.

    Attributes:
        model: the dense model, as adapted if it was.
        data: the images.
        seed: the run's seed.
        device: row of `devices.DEVICES`.
        threads: CPU threads the process may use.
        attention: what stays of a removed attention.
    """

    model: ModelSettings
    data: DataSettings
    seed: int
    device: str
    threads: int
    attention: Attention


@dataclass(frozen=True)
class LookTask:
    """Look at a node before anything is paid for.

    Attributes:
        model: the dense model.
        data: the images.
        folder: place in the run directory; the driver's file `driver` is there, and every node leaves one of its own.
        token: content of all these files.
        node: name of this node's file.
        driver: host of the driver.
    """

    model: ModelSettings
    data: DataSettings
    folder: str
    token: str
    node: str
    driver: str


@dataclass(frozen=True)
class AbsorbTask(Task):
    """Fit plain MLPs to the dense model's gated ones.

    Attributes:
        weights: place or URI for the weights of the model with them, safetensors.
        batches: batches of 64 training images to fit on; one in four tells the error.
    """

    weights: str = ""
    batches: int = 8


@dataclass(frozen=True)
class ProfileTask(Task):
    """Measure the costs of every unit.

    Attributes:
        batches: batch sizes to time.
        seconds: time to spend on all measurements, at most; compiling is not counted.
        compiled: measure models as torch compiles them.
    """

    batches: tuple[int, ...] = (1, 64)
    seconds: float = 10.0
    compiled: bool = False


@dataclass(frozen=True)
class TimingTask(ProfileTask):
    """Build plans and time them beside the dense model.

    Attributes:
        plans: their text forms.
    """

    plans: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankTask(Task):
    """Rank the units within each kind.

    Attributes:
        batches: number of batches of 64 training images in a pass.
        method: `taylor` or `conditional`, see `importance`.
        keep: text form of the units that are never removed, and not ranked.
    """

    batches: int = 16
    method: str = "taylor"
    keep: str = ""


@dataclass(frozen=True)
class TrialTask(Task):
    """What all trials of a run share.

    Attributes:
        recipe: the short fine-tune.
        checkpoints: folder or URI for the states of running trials.
        timeout: seconds after which a trial fails; 0 for no limit.
        start: weights that a trial starts from, those of a dense model; empty for the dense model's own.
        start_plan: text form of what those weights were trained without already.
    """

    recipe: Recipe
    checkpoints: str
    timeout: float = 0.0
    start: str = ""
    start_plan: str = "dense"


@dataclass(frozen=True)
class ProbeTask(Task):
    """The elastic probe.

    Attributes:
        recipe: how its shared weights are trained.
        ranking: makes the plans nested.
        lines: the cells of every budget.
        cells: the cells to evaluate.
        draw: `uniform`, over all cells; `line`, over `lines`, and then over the cells of one.
        sandwich: train every batch as the dense model and as a cell of the most units too.
        folder: place or URI for the state after the newest epoch, and for the shared weights.
        images: most images of the split `probe` to evaluate on.
        reseed: added to the seed of order and draws; the images stay those of `seed`.
    """

    recipe: Recipe
    ranking: Ranking
    lines: tuple[tuple[Cell, ...], ...]
    cells: tuple[Cell, ...]
    draw: str
    sandwich: bool
    folder: str
    images: int = 250
    reseed: int = 0

    @property
    def passes(self) -> int:
        """Passes over a batch: under the sandwich rule the dense model, a cell of the most units and a random cell."""
        return 3 if self.sandwich else 1

    @property
    def state(self) -> str:
        """Where the state after the newest epoch is."""
        return f"{self.folder}/state.pt"

    @property
    def weights(self) -> str:
        """Where the shared weights go: a dense model's, safetensors."""
        return f"{self.folder}/model.safetensors"


@dataclass(frozen=True)
class FinetuneTask(Task):
    """A long fine-tune.

    Attributes:
        recipe: how to train.
        plan: text form of what is removed first; `dense` for nothing.
        folder: place or URI for the state, the progress and the weights.
        inputs: digest of all that the result depends on; a state with another digest is not gone on from.
        workers: number of worker processes; where there may be fewer, the most.
        fewest: the fewest worker processes to go on with.
        start: weights to start from, those of a dense model; empty for the dense model's own.
        checkpoint_every: epochs between two states, at least.
        checkpoint_seconds: seconds between two states, at least.
        checkpoints: states kept, the newest ones.
    """

    recipe: Recipe
    plan: str
    folder: str
    inputs: str
    workers: int = 1
    fewest: int = 1
    start: str = ""
    checkpoint_every: int = 1
    checkpoint_seconds: float = 0.0
    checkpoints: int = 1

    @property
    def state(self) -> str:
        """Where the state after the newest epoch is."""
        return f"{self.folder}/state.pt"

    @property
    def progress(self) -> str:
        """Where the records of the epochs done are, for the driver to show."""
        return f"{self.folder}/progress.json"

    @property
    def result(self) -> str:
        """Where worker 0 leaves the result for the driver."""
        return f"{self.folder}/result.json"

    @property
    def weights(self) -> str:
        """Where the result's weights go: unmerged, safetensors."""
        return f"{self.folder}/model.safetensors"


@dataclass(frozen=True)
class ExportTask(Task):
    """Merge, check, test and time a fine-tuned plan.

    Attributes:
        plan: text form of what is removed.
        weights: the fine-tuned, unmerged weights.
        folder: where the export goes.
        batches: batch sizes to time.
        repeats: timing rounds per batch size.
        formats: what to write, of `FORMATS`; safetensors is always written.
        baseline: weights of the dense model after the same fine-tune; empty where it had none.
        compiled: time models as torch compiles them; ONNX stays as it is.
    """

    plan: str
    weights: str
    folder: str
    batches: tuple[int, ...] = (1, 64)
    repeats: int = 30
    formats: tuple[str, ...] = tuple(FORMATS)
    baseline: str = ""
    compiled: bool = False


@dataclass(frozen=True)
class BenchModel:
    """A model to time: one to load, or one to build.

    Attributes:
        name: as the user wrote it.
        location: an export folder, or a `.pt2` or `.onnx` file; a path or URI.
        model: what to build where there is no location.
        data: what tells how large its images are; None for as timm says.
    """

    name: str
    location: str = ""
    model: ModelSettings | None = None
    data: DataSettings | None = None


@dataclass(frozen=True)
class BenchTask:
    """Time models side by side.

    Attributes:
        models: what to time.
        device: row of `devices.DEVICES`.
        threads: CPU threads the process may use.
        batches: batch sizes to time.
        seconds: time to spend on each batch size.
        compiled: compile the models first (ONNX stays as it is).
    """

    models: tuple[BenchModel, ...]
    device: str
    threads: int
    batches: tuple[int, ...] = (1, 64)
    seconds: float = 10.0
    compiled: bool = False
