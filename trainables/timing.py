"""Warmed, synchronised timing of models side by side."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from search_spaces import family_of
from search_spaces.plan import Attention, PruningPlan
from trainables.compiling import check_compiler, compiled
from trainables.devices import autocast, synchronise
from trainables.intervals import median_interval
from trainables.tasks import TimingTask
from trainables.workspace import Workspace

FEWEST, MOST = 7, 200
"""Rounds of a measurement that is to take a given time."""
WARMING, WARM_SECONDS = 2, 5.0
"""Rounds of warming up; one is enough where it takes so long."""
FEWEST_TO_JUDGE = 15
"""Rounds by which a plan's speedup is judged, at least."""


def count_macs(model: torch.nn.Module, input_size: tuple[int, int, int]) -> float:
    """Return the multiply-accumulates of one image, counted by torch's flop counter with no data."""
    # The counter follows gradients where there are any, and fails where a parameter is a module's input.
    shadow = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.zeros(1, *input_size, device="meta"))
    return counter.get_total_flops() / 2


def count_params(model: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def interleaved_seconds(
    models: Sequence[Callable[..., torch.Tensor]], pixels: torch.Tensor, *, repeats: int, amp: bool = True
) -> np.ndarray:
    """Time one forward pass of each model in turn, again and again, so that drift of the machine hits all alike.

    Args:
        models: in evaluation mode, on the device of `pixels`, compiled or not.
        pixels: one batch, shape (B, C, H, W).
        repeats: number of rounds, after two of warming up.
        amp: mixed precision where the device has it.

    Returns:
        Seconds, shape (repeats, models).
    """
    return interleaved_calls(calls_of(models, pixels), pixels.device, repeats=repeats, amp=amp)


def calls_of(models: Sequence[Callable[..., torch.Tensor]], pixels: torch.Tensor) -> list[Callable[[], object]]:
    """Return what calls each of the models with one batch."""
    return [partial(model, pixels) for model in models]


def interleaved_calls(
    calls: Sequence[Callable[[], object]], device: torch.device, *, repeats: int, amp: bool = True
) -> np.ndarray:
    """Time each call in turn, again and again; see `interleaved_seconds`. Returns seconds, shape (repeats, calls)."""
    return calls_within(0.0, calls, device, fewest=repeats, amp=amp)


def calls_within(
    seconds: float,
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    fewest: int = FEWEST,
    amp: bool = True,
    enough: Callable[[np.ndarray], bool] | None = None,
) -> np.ndarray:
    """Time each call in turn, again and again, until so long has passed.

    Args:
        seconds: when to stop, warming up counted.
        calls: what to time.
        device: what to wait for.
        fewest: rounds to take whatever their time.
        amp: mixed precision where the device has it.
        enough: asked every `fewest` rounds whether seconds (rounds, calls) will do; left out, `MOST` rounds do.

    Returns:
        Seconds, shape (rounds, calls).
    """
    begun, rounds = time.perf_counter(), list[list[float]]()
    with torch.inference_mode(), autocast(device, amp):
        for _ in range(WARMING):
            if sum(_one_round(calls, device)) > WARM_SECONDS:
                break
        while len(rounds) < fewest or time.perf_counter() - begun < seconds:
            rounds.append(_one_round(calls, device))
            if enough is None:
                if len(rounds) >= max(MOST, fewest):
                    break
            elif len(rounds) % fewest == 0 and enough(np.array(rounds)):
                break
    return np.array(rounds)


def _one_round(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Return the seconds of each call, the device synchronised around it."""
    seconds, clock = [], clock_of(device)
    for call in calls:
        synchronise(device)
        start = clock()
        call()
        synchronise(device)
        seconds.append(clock() - start)
    return seconds


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return what seconds are read from: the thread's own CPU time where all is done by one thread of a CPU.

    It is what the wall clock says on a machine that does nothing else; what other programs take from a shared core is
    no cost of a model. Several threads, and accelerators, have the wall clock only.
    """
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def time_plans(task: TimingTask) -> dict[str, dict[str, dict[str, float]]]:
    """Build the merged model of each plan and time it beside the dense one; weights do not matter for that.

    Returns:
        By plan and batch size the seconds of both, and the speedup with its 95 % interval.

    Raises:
        BadInput: there is no compiler, and models were to be compiled.
    """
    workspace = Workspace(task)
    dense, size = workspace.dense.to(workspace.device).eval(), workspace.view.input_size
    if task.compiled:
        check_compiler(workspace.device)
    told = compiled if task.compiled else _as_is
    fixed = told(dense)
    found: dict[str, dict[str, dict[str, float]]] = {}
    share = task.seconds / max(1, len(task.plans) * len(task.batches))
    for text in task.plans:
        merged = merged_without(dense, PruningPlan.parse(text), task.attention).to(workspace.device)
        models = [fixed, told(merged)]
        found[text] = {}
        for batch in task.batches:
            pixels = torch.randn(batch, *size, device=workspace.device)
            seconds = calls_within(share, calls_of(models, pixels), pixels.device, fewest=FEWEST_TO_JUDGE)
            found[text][str(batch)] = against_dense(speed(seconds, 0), speed(seconds, 1))
    return found


def _as_is(model: torch.nn.Module) -> torch.nn.Module:
    return model


def speed(seconds: np.ndarray, column: int) -> dict[str, float]:
    """Return a column's median and its speedup over the first, from seconds of shape (rounds, models).

    The speedup has a 95 % interval, `low` to `high`.
    """
    speedup, low, high = median_interval(list(seconds[:, 0] / seconds[:, column]))
    return {"seconds": float(np.median(seconds[:, column])), "speedup": speedup, "low": low, "high": high}


def against_dense(dense: dict[str, float], merged: dict[str, float]) -> dict[str, float]:
    """Return the seconds of both and the speedup with its interval, from what `speed` returns of each."""
    ratio = {name: merged[name] for name in ("speedup", "low", "high")}
    return {"dense_seconds": dense["seconds"], "merged_seconds": merged["seconds"], **ratio}


def merged_without(dense: torch.nn.Module, plan: PruningPlan, attention: Attention) -> torch.nn.Module:
    """Return a merged copy of a model without a plan's units."""
    family = family_of(dense)
    model: torch.nn.Module = family.merge(family.remove(copy.deepcopy(dense), plan, attention)).eval()
    return model
