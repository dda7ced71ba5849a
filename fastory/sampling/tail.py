"""What a micro-batch's pictures need after their last step: on a GPU it runs beside the next micro-batch's steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Work = TypeVar("Work")


def beside(device: torch.device) -> Executor | None:
    """The thread that works beside the steps: one with a GPU, whose host waits; none on the CPU, which is busy with them."""
    return ThreadPoolExecutor(1, "fastory-tail") if device.type == "cuda" else None


class Tail(Generic[Work]):
    """Work on latents, in the order in which it came, on a thread and a stream of its own; on the CPU it is done at once.

    A context manager: what is left waits for nobody when it ends. A graph must not be captured while there is work: the work of
    one micro-batch is over before inputs of another shape come.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._thread = device, beside(device)
        cuda = self._thread is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._waiting: list[Future[Work]] = []
        self._done: list[Work] = []

    def submit(self, work: Callable[[Tensor], Work], latents: Tensor) -> None:
        """Begin `work` on latents, whose memory may be written again afterwards."""
        if self._thread is None:
            self._done.append(work(latents))
            return
        own, ready = latents.clone(), None
        if self._stream is not None:
            # Memory that the steps have let go of is read by kernels that come before this, so it may be taken again, too.
            ready = torch.cuda.current_stream(self._device).record_event(torch.cuda.Event())
        self._waiting.append(self._thread.submit(partial(self._run, work, own, ready)))

    def _run(self, work: Callable[[Tensor], Work], latents: Tensor, ready: Any) -> Work:
        if self._stream is None:
            return work(latents)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            done = work(latents)
            self._stream.synchronize()  # what it gives is there for any stream
        return done

    def ready(self) -> list[Work]:
        """What is done, in order: all that was submitted, or nothing while some of it is still being worked on.

        Raises what the work raised.
        """
        return self.rest() if all(future.done() for future in self._waiting) else []

    def rest(self) -> list[Work]:
        """All that was submitted, waited for. Raises what the work raised."""
        waiting, self._waiting = self._waiting, []
        done, self._done = self._done, []
        return [*done, *(future.result() for future in waiting)]

    def __enter__(self) -> Tail[Work]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
