"""Interleaved timing: every way is called in turn, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from statistics import quantiles

import torch

Call = Callable[[], object]
COLD_BYTES = 150 << 20


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50, p80 in microseconds."""
    fifths = quantiles([1e6 * s for s in seconds], n=10, method="inclusive")
    return {"p20": round(fifths[1], 3), "p50": round(fifths[4], 3), "p80": round(fifths[7], 3)}


def time_cpu(calls: dict[str, Call], budget: float = 1.0, samples: int = 31) -> dict[str, dict[str, float]]:
    """Microseconds of each call on the CPU: `samples` rounds over all ways, repeated within `budget` seconds a way."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        repeats[name] = max(1, int(budget / samples / max(once, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    for _ in range(samples):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            taken[name].append((time.perf_counter() - start) / repeats[name])
    gc.enable()
    return {name: summary(seconds) for name, seconds in taken.items()}


class CaptureFailed(RuntimeError):
    """A call that cannot be captured: timing it eagerly would time something else."""


def capture(calls: Sequence[Call]) -> Callable[[], None]:
    """One CUDA graph that makes these calls one after another. Raises CaptureFailed where one cannot be captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        raise CaptureFailed(str(error).strip().splitlines()[0]) from error
    return graph.replay


def time_cuda(
    calls: dict[str, Sequence[Call]], samples: int = 25
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Microseconds of one call on the device, and why a way has none.

    Each way brings one call per copy of the inputs (cold) or one, repeated; a way that cannot be captured is not timed.
    """
    replays, failed = {}, {}
    for name, sequence in calls.items():
        try:
            replays[name] = capture(sequence)
        except CaptureFailed as error:
            failed[name] = f"could not be captured: {error}"
    taken: dict[str, list[float]] = {name: [] for name in replays}
    for sample in range(samples + 3):
        for name, replay in replays.items():
            seconds = cuda_seconds(replay) / len(calls[name])
            if sample >= 3:
                taken[name].append(seconds)
    return {name: summary(seconds) for name, seconds in taken.items()}, failed


def cuda_seconds(call: Call) -> float:
    """Seconds of one call on the device, by CUDA events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def time_one(call: Call, device: str, samples: int = 25) -> dict[str, float]:
    """Microseconds of one call (p20, p50, p80), after three that are not counted; on CUDA by events, as it is called."""

    def cpu_seconds(call: Call) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    seconds = cuda_seconds if device == "cuda" else cpu_seconds
    return summary([seconds(call) for _ in range(samples + 3)][3:])


def copies_for(bytes_of_inputs: int) -> int:
    """How many copies of the inputs are more than the cache holds."""
    return max(2, -(-COLD_BYTES // max(1, bytes_of_inputs)))
