"""One UNet call: eager, or replayed from a CUDA graph. A further way to call the UNet is a class and a line in denoiser_of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastory.errors import FastoryError
from fastory.models.protocol import Model, UnetInputs
from fastory.runtime import is_out_of_memory


class Denoiser(Protocol):
    """How the UNet is called."""

    def predict(self, inputs: UnetInputs) -> Tensor:
        """The prediction (R, c, h, w). It may lie in memory that the next call writes again."""

    def forget(self, inputs: UnetInputs) -> None:
        """These inputs are not given again."""


class Eager:
    """The model's own call."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, inputs: UnetInputs) -> Tensor:
        """The prediction (R, c, h, w)."""
        return self.model.predict(inputs)

    def forget(self, inputs: UnetInputs) -> None:
        """Nothing is kept."""


class Replayed(Protocol):
    """A captured UNet call."""

    def replay(self) -> None:
        """Compute it again from what its static inputs hold now."""


@contextmanager
def explained(capture: AbstractContextManager[Any]) -> Iterator[None]:
    """`capture`, with the error that a failed call raised in place of the one that torch raises at the end of it.

    Raises FastoryError for a call that cannot be captured; memory that ran out is what it is, so that less is tried.
    """
    first: RuntimeError | None = None
    try:
        with capture:
            try:
                yield
            except RuntimeError as error:
                first = error
                raise
    except RuntimeError as error:
        first = first or error
        if is_out_of_memory(first):
            raise first from None
        raise FastoryError(f"a UNet call could not be captured ({first}); draw with --graphs off") from error


class Captured:
    """The call replayed from a CUDA graph, captured on first use: one launch in place of some thousand.

    The result lies in the graph's own memory, which the next replay writes again. All graphs of a sampler share that memory:
    one call is over, and its result read, before another begins.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        # By the identity of the inputs, which are kept with their graph: a step may read some of the rows alone.
        self.graphs: dict[int, tuple[UnetInputs, Replayed, Tensor]] = {}
        self.pool: Any = None

    def predict(self, inputs: UnetInputs) -> Tensor:
        """The prediction (R, c, h, w) from what the inputs' buffers hold now."""
        if id(inputs) not in self.graphs:
            self.graphs[id(inputs)] = (inputs, *self.capture(inputs))
        _, graph, prediction = self.graphs[id(inputs)]
        graph.replay()
        return prediction

    def forget(self, inputs: UnetInputs) -> None:
        """The graph that reads them goes."""
        self.graphs.pop(id(inputs), None)

    def capture(self, inputs: UnetInputs) -> tuple[Replayed, Tensor]:
        """A graph of the call, and where its replay leaves the prediction."""
        device, graph = self.model.placement.device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            # torch's own capture stream belongs to the device that was current at the first capture of the process.
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):  # kernels are compiled and chosen here, which capture forbids
                self.model.predict(inputs)
                self.model.predict(inputs)
            torch.cuda.current_stream(device).wait_stream(aside)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            with explained(torch.cuda.graph(graph, pool=self.pool, stream=aside)):
                prediction = self.model.predict(inputs)
        return graph, prediction


def denoiser_of(model: Model) -> Denoiser:
    """How the UNet of `model` is called where the model is placed."""
    return Captured(model) if model.placement.graphs else Eager(model)
