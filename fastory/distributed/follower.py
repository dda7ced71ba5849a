"""The processes of torchrun beside rank 0: each draws what it is sent, and sends the pictures back. They write nothing."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastory.distributed.channel import Channel
from fastory.distributed.launch import Launch, process_group
from fastory.distributed.messages import (
    BeginStory,
    Computing,
    Done,
    DrawFrames,
    Drawn,
    DrawStories,
    Failed,
    Lost,
    OutOfMemory,
    Snapshot,
    Stop,
)
from fastory.distributed.ranks import hello_of
from fastory.errors import FastoryError
from fastory.events import BatchHalved, Event, FrameDrawn
from fastory.models.protocol import Model
from fastory.modes.iterative import IterativeRun, draw_batches
from fastory.modes.mode import mode_of
from fastory.runtime import is_out_of_memory, release_memory
from fastory.sampling.sampler import leave_idle
from fastory.wording import last_words

Open = Callable[[str, str | None, bool | None], Model]
"""Opens the model: on a device, in a dtype and with graphs, None for what the command line says."""


def follow(launch: Launch, device: str, open_model: Open) -> int:
    """Draw what rank 0 sends until it says that nothing follows. Returns an exit code: 0, or 1 where this process failed.

    What went wrong is said by rank 0; where that is gone, by rank 1.
    """
    with process_group(launch):
        channel = Channel(0)
        signal.signal(signal.SIGTERM, partial(_ended_by_torchrun, launch, channel))
        try:
            own = launch.device(device)
            follower = Follower(channel, lambda dtype, graphs: open_model(own, dtype, graphs))
            return _said(launch, channel) if follower.run() else 0
        except KeyboardInterrupt:
            return 130  # rank 0 has had it, too
        except Exception as error:
            code = error.exit_code if isinstance(error, FastoryError) else 1
            channel.send(Failed(str(error) if isinstance(error, FastoryError) else last_words(error), code))
            while not isinstance(channel.receive(), Stop | Lost):
                pass
            return 1
        finally:
            channel.close()


def _ended_by_torchrun(launch: Launch, channel: Channel, *_: object) -> None:
    """SIGTERM: torchrun ends all processes when one has died."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun says it more than once
    sys.exit(_said(launch, channel))


def _said(launch: Launch, channel: Channel) -> int:
    """Say that rank 0 is gone, where it is; exit code 1."""
    if channel.lost is not None and launch.rank == 1:
        sys.stderr.write(
            "error: rank 0 ended while others went on. What is finished is kept; the same command goes on.\n"
        )
    return 1


class Follower:
    """Draws for rank 0 with one model, which is opened anew where a run began in another dtype."""

    def __init__(self, channel: Channel, open_model: Callable[[str | None, bool | None], Model]) -> None:
        """open_model(dtype, graphs): on the device of this process; None for what the command line says."""
        self._channel = channel
        self._open = open_model
        self._model = open_model(None, None)
        self._story: IterativeRun | None = None
        channel.send(hello_of(self._model))

    def run(self) -> bool:
        """Until rank 0 says that nothing follows. True where it is gone."""
        while True:
            message = self._channel.receive()
            match message:
                case Stop() | Lost():
                    return isinstance(message, Lost)
                case BeginStory():
                    self._begin(message)
                case DrawFrames():
                    self._draw(self._frames(message))
                case DrawStories():
                    self._draw(self._stories(message))

    def _model_for(self, computing: Computing) -> Model:
        """The model as the run computes."""
        torch.set_num_threads(computing.threads)
        placement = self._model.placement
        if (placement.dtype_name, placement.graphs) != (computing.dtype, computing.graphs):
            self._story = None
            self._model = self._open(computing.dtype, computing.graphs)
        return self._model

    def _begin(self, message: BeginStory) -> None:
        model = self._model_for(message.computing)
        device = model.placement.device
        characters = {name: [t.to(device) for t in tokens] for name, tokens in message.characters.items()}
        if self._story is not None:
            leave_idle(self._story.sampler)
        self._story = None
        self._story = IterativeRun.of(model, message.plan, message.batch_sizes, message.size, characters)

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
        model = self._model_for(message.computing)
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

    def _draw(self, events: Iterator[Event | Drawn]) -> None:
        """Send what is drawn, then that it is done, or that memory ran out."""
        try:
            for event in events:
                self._channel.send(event)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            needed = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            self._channel.send(Done())
            return
        if self._story is not None:
            self._story.sampler = None
        release_memory(self._model.placement.device)
        self._channel.send(OutOfMemory(needed))
