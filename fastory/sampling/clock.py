"""How long the steps of a loop took on their device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch


def timed(device: torch.device, steps: Iterable[None]) -> Iterator[float]:
    """Seconds of each step, yielded when it is done on `device`; what the reader does in between does not count.

    On CUDA a step is waited for after the next one was enqueued, so that the device always has work.
    """
    return _on_cuda(device, steps) if device.type == "cuda" else _on_cpu(steps)


def _on_cpu(steps: Iterable[None]) -> Iterator[float]:
    before = time.perf_counter()
    for _ in steps:
        yield time.perf_counter() - before
        before = time.perf_counter()


def _on_cuda(device: torch.device, steps: Iterable[None]) -> Iterator[float]:
    stream = torch.cuda.current_stream(device)
    pending: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
    start = stream.record_event(torch.cuda.Event(enable_timing=True))
    for _ in steps:
        end = stream.record_event(torch.cuda.Event(enable_timing=True))
        if pending is not None:
            yield _seconds(*pending)
        pending = start, end
        start = stream.record_event(torch.cuda.Event(enable_timing=True))
    if pending is not None:
        yield _seconds(*pending)


def _seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1000
