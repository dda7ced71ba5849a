"""What a process draws for another one that leads: micro-batches of its story's rounds, or whole stories, with one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fastory.distributed.messages import (
    BeginStory,
    Computing,
    Done,
    DrawFrames,
    Drawn,
    DrawStories,
    OutOfMemory,
    Snapshot,
)
from fastory.events import BatchHalved, Event, FrameDrawn
from fastory.models.copies import attending_copy
from fastory.models.protocol import Model
from fastory.modes.iterative import IterativeRun, draw_batches
from fastory.modes.mode import mode_of
from fastory.runtime import is_out_of_memory, release_memory
from fastory.sampling.sampler import leave_idle

Open = Callable[[str | None, bool | None], Model]
"""Opens the model in a dtype and with graphs, None for what the command line says."""
Answer = Event | Drawn | Done | OutOfMemory


class ShareDrawer:
    """Draws shares with one model, which is opened anew where a run began in another dtype."""

    def __init__(self, open_model: Open) -> None:
        """open_model(dtype, graphs): on the device of this process."""
        self._open = open_model
        self.model = open_model(None, None)
        self._story: IterativeRun | None = None

    def begin(self, message: BeginStory) -> None:
        """The story of the frames that follow."""
        model = self._model_for(message.computing, message.size)
        device = model.placement.device
        characters = {name: [t.to(device) for t in tokens] for name, tokens in message.characters.items()}
        if self._story is not None:
            leave_idle(self._story.sampler)
        self._story = None
        self._story = IterativeRun.of(model, message.plan, message.batch_sizes, message.size, characters)

    def frames(self, message: DrawFrames) -> Iterator[Answer]:
        """Events and pictures of micro-batches of that story; at the end that it is done, or that memory ran out."""
        return self._until_memory_ends(self._frames(message))

    def stories(self, message: DrawStories) -> Iterator[Answer]:
        """The same of whole stories."""
        return self._until_memory_ends(self._stories(message))

    def _model_for(self, computing: Computing, size: tuple[int, int]) -> Model:
        """The model as the run computes. size: of its pictures, in pixels."""
        torch.set_num_threads(computing.threads)
        placement = self.model.placement
        if (placement.dtype_name, placement.graphs) != (computing.dtype, computing.graphs):
            self._story = None
            self.model = self._open(computing.dtype, computing.graphs)
        model: Model = self.model.compiled if computing.compiled else self.model
        return attending_copy(model, dict(computing.attention), *size) if computing.attention else model

    def _frames(self, message: DrawFrames) -> Iterator[Event | Drawn]:
        run, k = self._story, message.round.number
        assert run is not None
        run.drawn.begin(k)
        for frame, seen in message.last.items():
            run.drawn.put_reference(k - 1, frame, seen.to(run.model.placement.device))
        for event in draw_batches(run, message.round, message.batches):
            if isinstance(event, FrameDrawn):
                kept = run.drawn.seen(k, event.frame) if k < run.settings.iterations else None
                yield Drawn.of(event, None if kept is None else kept.to(torch.device("cpu")))
            else:
                yield event

    def _stories(self, message: DrawStories) -> Iterator[Event | Drawn]:
        model = self._model_for(message.computing, message.size)
        mode = mode_of(message.mode)
        for event in mode.draw(model, message.plans, batch_sizes=message.batch_sizes, size=message.size):
            if isinstance(event, FrameDrawn):
                yield Drawn.of(event)
                continue
            if isinstance(event, BatchHalved) and event.frame is not None:
                for plan in message.plans:
                    assert isinstance(plan.finished, Snapshot)
                    plan.finished.forget(event.round, event.frame)
            yield event

    def _until_memory_ends(self, events: Iterator[Event | Drawn]) -> Iterator[Answer]:
        try:
            yield from events
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            needed = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            yield Done()
            return
        if self._story is not None:
            self._story.sampler = None
        release_memory(self.model.placement.device)
        yield OutOfMemory(needed)
