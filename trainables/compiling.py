"""Models as torch compiles them, and whether it can on this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from search_spaces import BadInput
from trainables.devices import torch_device

_VARIANTS = 256
"""Models and batch sizes that one process may compile; torch would silently run what is beyond its limit of 8 as it is,
because it counts all models of one class together."""


def compiled(model: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """Return what calls a model compiled, anew for every batch size, so that each is as fast as it can be.

    The model itself is left as it is; torch compiles when it is called.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _VARIANTS)
    made: Callable[..., torch.Tensor] = torch.compile(model, dynamic=False)
    return made


def compile_in_place(model: torch.nn.Module) -> None:
    """Let torch compile a model when it is called, with the names of its weights as they are.

    Raises:
        BadInput: it cannot be done here.
    """
    check_compiler(next(model.parameters()).device)
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _VARIANTS)
    model.compile(dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        BadInput: it cannot be done.
    """
    try:
        # Nothing that an earlier process compiled may stand in for a compiler.
        with torch._inductor.utils.fresh_cache():
            torch.compile(lambda x: x * 2 + 1)(torch.ones(4, device=device))
    except Exception as error:  # every compiler is missing in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"--compiled, or a recipe with compile, needs a compiler that torch can use, and there is none: {reason}; "
            "install one (g++ for the CPU, triton for GPUs), or do without it (of a run: --compiled false)"
        ) from None


def check_compiler_of(device: str) -> None:
    """Do `check_compiler` for a row of `devices.DEVICES`."""
    check_compiler(torch_device(device))
