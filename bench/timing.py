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


def capture(calls: Sequence[Call]) -> Callable[[], None]:
    """One CUDA graph that makes these calls one after another; where one cannot be captured, the calls themselves."""
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
    except RuntimeError:
        torch.cuda.synchronize()
        return lambda: [call() for call in calls] and None
    return graph.replay


def time_cuda(calls: dict[str, Sequence[Call]], samples: int = 25) -> dict[str, dict[str, float]]:
    """Microseconds of one call on the device. Each way brings one call per copy of the inputs (cold) or one, repeated."""
    replays = {name: capture(sequence) for name, sequence in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for sample in range(samples + 3):
        for name, replay in replays.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replay()
            end.record()
            end.synchronize()
            if sample >= 3:
                taken[name].append(1e-3 * begin.elapsed_time(end) / len(calls[name]))
    return {name: summary(seconds) for name, seconds in taken.items()}


def copies_for(bytes_of_inputs: int) -> int:
    """How many copies of the inputs are more than the cache holds."""
    return max(2, -(-COLD_BYTES // max(1, bytes_of_inputs)))
