"""The merged model in formats that load without this package: a `torch.export` program and ONNX.

Both take `pixels`, float32 of shape (B, C, H, W) for any B, and give `logits`, shape (B, K).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pyarrow import fs
from torch.export import Dim, ExportedProgram

from search_spaces import BadInput
from trainables.locations import exists, read_bytes, resolve, write_bytes
from trainables.tasks import FORMATS

LARGEST_ONNX = 1.5e9
"""Bytes of weights from which ONNX keeps them in a file of their own: one protobuf message holds 2 GiB."""


class BadFormat(BadInput):
    """The model cannot be written in a format, or a file is none; the message says what to do."""


class Loaded(torch.nn.Module):
    """A model as loaded from a file, to be called as any other, in evaluation mode and where it is."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], input_size: tuple[int, ...]) -> None:
        """
        Args:
            run: takes pixels (B, C, H, W) and returns logits (B, K).
            input_size: (C, H, W).
        """
        super().__init__()
        self.run, self.input_size = run, input_size

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.run(pixels)


def write_formats(names: Sequence[str], folder: str, model: torch.nn.Module, input_size: tuple[int, int, int]) -> None:
    """Write a model into a folder (path or URI) in each of some formats of `WRITERS`.

    Args:
        names: the formats; none is written where there is none.
        folder: where to.
        model: in float32, on the CPU.
        input_size: (C, H, W).

    Raises:
        BadFormat: torch cannot express the model in one of them.
    """
    if not names:
        return
    name = names[0]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            program = _program(model, input_size)
            for name in names:
                WRITERS[name](program, str(Path(scratch, FORMATS[name])))
        except Exception as error:  # torch's exporters have many kinds of error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadFormat(f"cannot write the model as {name}: {reason}; leave it out of --export-formats") from None
        for path in Path(scratch).iterdir():
            write_bytes(f"{folder}/{path.name}", path.read_bytes())


def _program(model: torch.nn.Module, input_size: tuple[int, int, int]) -> ExportedProgram:
    # Two images: torch takes a size of one for a constant.
    example = torch.zeros(2, *input_size)
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: Dim("batch", min=1)},))
    for node in program.graph.nodes:
        # It would tell every user where on this machine the code lies.
        node.meta.pop("stack_trace", None)
    return program


def _write_pt2(program: ExportedProgram, path: str) -> None:
    torch.export.save(program, path)


def _write_onnx(program: ExportedProgram, path: str) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    written = torch.onnx.export(
        program, dynamo=True, input_names=["pixels"], output_names=["logits"], dynamic_shapes=({0: "batch"},),
        verbose=False,
    )  # fmt: skip
    assert written is not None
    written.save(path, external_data=size > LARGEST_ONNX)


WRITERS = {"pt2": _write_pt2, "onnx": _write_onnx}


def load_format(location: str, device: torch.device) -> Loaded:
    """Load a `.pt2` or `.onnx` file (path or URI); ONNX stays on the CPU, with as many threads as torch has.

    Raises:
        BadFormat: there is no such file, or it is something else.
    """
    loader = _load_onnx if location.endswith(".onnx") else _load_pt2
    if not exists(location):
        raise BadFormat(f"{location!r} does not exist")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return loader(on_this_disk(location, scratch), device)
        except Exception as error:  # each loader has its own kinds of error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadFormat(f"cannot load {location!r}: {reason}") from None


def on_this_disk(location: str, scratch: str) -> str:
    """Return a file's path on this machine, copied to `scratch`, with weights beside it, from where it is not."""
    filesystem, path = resolve(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        return path
    name = location.rpartition("/")[2]
    for suffix in ("", ".data"):
        if exists(location + suffix):
            Path(scratch, name + suffix).write_bytes(read_bytes(location + suffix))
    return str(Path(scratch, name))


def _load_pt2(path: str, device: torch.device) -> Loaded:
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(path)
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    (pixels,) = program.example_inputs[0] if program.example_inputs else (torch.empty(0),)
    module = program.module()
    # As a function, because a program has no evaluation mode to be put into: it is in it.
    return Loaded(lambda batch: module(batch), tuple(pixels.shape[1:]))


def _load_onnx(path: str, _: torch.device) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait busily for the next batch would take time from what is timed beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (pixels,) = session.get_inputs()
    return Loaded(
        lambda batch: torch.from_numpy(session.run(None, {pixels.name: batch.numpy()})[0]), tuple(pixels.shape[1:])
    )


_REFUSE_OURS = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dpt_search", "trainables", "search_spaces"):
            raise ImportError(f"it needs {name}, which is not everywhere")
sys.meta_path.insert(0, Refuse())
import numpy
file, given, made = sys.argv[1:]
pixels = numpy.load(given)
"""

STANDALONE = {
    "pt2": f"""{_REFUSE_OURS}
import torch
with torch.inference_mode():
    numpy.save(made, torch.export.load(file).module()(torch.from_numpy(pixels)).numpy())
""",
    "onnx": f"""{_REFUSE_OURS}
import onnxruntime
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
numpy.save(made, session.run(None, {{session.get_inputs()[0].name: pixels}})[0])
""",
}
"""Programs for a fresh process, to which this package is as if not installed: model, pixels and logits are files."""
