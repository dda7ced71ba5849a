"""One UNet call: eager, with compiled blocks, or either replayed from a CUDA graph.

A further way to call the UNet is a class and a line in denoiser_of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastory.errors import FastoryError
from fastory.models.protocol import Features, Model, UnetInputs
from fastory.runtime import is_out_of_memory


class Denoiser(Protocol):
    """How the UNet is called."""

    def compile(self, inputs: UnetInputs) -> Iterator[tuple[int, int]]:
        """Compile what a call with these inputs wants and is not there yet; yields (done, of all) after each part of it."""

    def begin(self) -> None:
        """The steps of a micro-batch begin."""

    def predict(self, inputs: UnetInputs) -> Tensor:
        """The prediction (R, c, h, w). It may lie in memory that the next call writes again."""

    def forget(self, inputs: UnetInputs) -> None:
        """These inputs are not given again."""


class Eager:
    """The model's own call."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def compile(self, inputs: UnetInputs) -> Iterator[tuple[int, int]]:
        """Nothing is compiled."""
        return iter(())

    def begin(self) -> None:
        """A call knows none before it."""

    def predict(self, inputs: UnetInputs) -> Tensor:
        """The prediction (R, c, h, w)."""
        return self.model.predict(inputs)

    def forget(self, inputs: UnetInputs) -> None:
        """Nothing is kept."""


class Compiled:
    """The call with the UNet's repeated blocks compiled (fastory.processors.compiled)."""

    def __init__(self, model: Model) -> None:
        self.model, self.blocks = model, model.blocks()
        # By the identity of the inputs, which are kept with what stands for them.
        self.read: dict[int, tuple[UnetInputs, UnetInputs]] = {}
        self.ready: set[int] = set()

    def _read(self, inputs: UnetInputs) -> UnetInputs:
        """The same in the same memory, and where there are no references, some that nobody sees: that is no other graph."""
        if id(inputs) not in self.read:
            self.read[id(inputs)] = (inputs, replace(inputs, context=inputs.context.never_empty()))
        return self.read[id(inputs)][1]

    def compile(self, inputs: UnetInputs) -> Iterator[tuple[int, int]]:
        """One block of each kind; of those that are there already, nothing is said."""
        if id(inputs) in self.ready:
            return
        for done in self.blocks.compile(partial(self.model.predict, self._read(inputs))):
            yield done, self.blocks.kinds
        self.ready.add(id(inputs))

    def begin(self) -> None:
        """A call knows none before it."""

    def predict(self, inputs: UnetInputs) -> Tensor:
        """The prediction (R, c, h, w)."""
        with self.blocks.calls():
            return self.model.predict(self._read(inputs))

    def forget(self, inputs: UnetInputs) -> None:
        """What stands for them goes."""
        self.read.pop(id(inputs), None)
        self.ready.discard(id(inputs))


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

    def __init__(self, model: Model, call: Eager | Compiled | Within | None = None) -> None:
        """call: what is captured, the model's own where it is not given."""
        self.model, self.call = model, call or Eager(model)
        # By the identity of the inputs, which are kept with their graph: a step may read some of the rows alone.
        self.graphs: dict[int, tuple[UnetInputs, Replayed, Tensor]] = {}
        self.pool: Any = None

    def compile(self, inputs: UnetInputs) -> Iterator[tuple[int, int]]:
        """As of what is captured."""
        return self.call.compile(inputs)

    def begin(self) -> None:
        """A call knows none before it."""

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
        self.call.forget(inputs)

    def capture(self, inputs: UnetInputs) -> tuple[Replayed, Tensor]:
        """A graph of the call, and where its replay leaves the prediction."""
        device, graph = self.model.placement.device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            # torch's own capture stream belongs to the device that was current at the first capture of the process.
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):  # kernels are compiled and chosen here, which capture forbids
                self.call.predict(inputs)
                self.call.predict(inputs)
            torch.cuda.current_stream(device).wait_stream(aside)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            with explained(torch.cuda.graph(graph, pool=self.pool, stream=aside)):
                prediction = self.call.predict(inputs)
        return graph, prediction


class Within:
    """A call within a context of its own. around: makes it, for inputs of this identity."""

    def __init__(self, call: Eager | Compiled, around: Callable[[int], AbstractContextManager[None]]) -> None:
        self.call, self.around = call, around

    def compile(self, inputs: UnetInputs) -> Iterator[tuple[int, int]]:
        """As of the call."""
        return self.call.compile(inputs)

    def begin(self) -> None:
        """A call knows none before it."""

    def predict(self, inputs: UnetInputs) -> Tensor:
        """The prediction (R, c, h, w)."""
        with self.around(id(inputs)):
            return self.call.predict(inputs)

    def forget(self, inputs: UnetInputs) -> None:
        """As of the call."""
        self.call.forget(inputs)


class Reusing:
    """One of `interval` calls is whole, the others take its deep features; the first with other inputs is whole, too."""

    def __init__(self, whole: Denoiser, shallow: Denoiser, features: Features, interval: int) -> None:
        self.whole, self.shallow, self.features, self.interval = whole, shallow, features, interval
        self.begin()

    def begin(self) -> None:
        """The next call is whole: what a micro-batch computes does not depend on those before it."""
        self.last: UnetInputs | None = None
        self.since = 0

    def compile(self, inputs: UnetInputs) -> Iterator[tuple[int, int]]:
        """As of a whole call, which has every block."""
        return self.whole.compile(inputs)

    def predict(self, inputs: UnetInputs) -> Tensor:
        """The prediction (R, c, h, w)."""
        if inputs is not self.last:
            self.last, self.since = inputs, 0
        call = self.shallow if self.since % self.interval else self.whole
        self.since += 1
        return call.predict(inputs)

    def forget(self, inputs: UnetInputs) -> None:
        """What was captured and kept for them goes."""
        for call in (self.whole, self.shallow):
            call.forget(inputs)
        self.features.forget(id(inputs))


def denoiser_of(model: Model, cache_interval: int = 1) -> Denoiser:
    """How the UNet of `model` is called where the model is placed. cache_interval: as of Settings."""
    call = Compiled(model) if model.placement.compiled else Eager(model)

    def captured(call: Eager | Compiled | Within) -> Denoiser:
        return Captured(model, call) if model.placement.graphs else call

    if cache_interval == 1:
        return captured(call)
    features = model.deep_features()
    whole, shallow = (captured(Within(call, around)) for around in (features.kept, features.reused))
    return Reusing(whole, shallow, features, cache_interval)
