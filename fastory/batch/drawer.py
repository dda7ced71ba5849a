"""What a worker does: one model, opened once, draws story after story into run folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from fastory import __version__
from fastory.batch.messages import (
    Checked,
    CheckStories,
    Drawing,
    Drawn,
    DrawStory,
    Finished,
    Message,
    Noted,
    NotOpened,
    Opened,
    Refused,
)
from fastory.errors import FastoryError
from fastory.events import BatchHalved, FrameDrawn, Notice, StoryFinished, StoryStarted
from fastory.modes.executor import HERE, Executor
from fastory.wording import last_words


class Drawer:
    """Draws the stories of a batch with one model."""

    def __init__(self, drawing: Drawing, device: str) -> None:
        """device: as --device has it."""
        self._drawing = drawing
        self._device = device
        self._model: Any = None

    def open(self) -> Opened | NotOpened:
        """Open the model, unless it is open."""
        try:
            if self._model is None:
                self._model = self._drawing.open_model(self._device)
        except FastoryError as error:
            return NotOpened(str(error), error.exit_code)
        except Exception as error:
            return NotOpened(last_words(error), 1)
        return opened(self._model)

    def check(self, task: CheckStories) -> Checked:
        """What the model says against stories, before any of them is drawn."""
        from fastory.runs.resolve import resolve_story

        arguments = dict(self._drawing.arguments)
        how = {name: arguments.pop(name, None) for name in ("preset", "batch_size")}
        refused = {}
        for name, story in task.stories.items():
            try:
                resolve_story(self._model, story, arguments, **how)
            except FastoryError as error:
                refused[name] = str(error)
        return Checked(refused)

    def draw(self, task: DrawStory, executor: Executor = HERE) -> Iterator[Message]:
        """Draw what is missing of a story; the last message is Drawn or Refused. executor: where its frames are drawn."""
        from fastory.runs.generate import generate

        try:
            events = generate(
                task.story,
                model=self._model,
                output=task.folder,
                executor=executor,
                **self._drawing.arguments,
            )
            yield from _messages_of(events)
        except FastoryError as error:
            yield Refused(str(error), error.exit_code, isinstance(error.__cause__, OSError))
        except Exception as error:
            yield Refused(last_words(error), 1, isinstance(error, OSError))


def _messages_of(events: Iterator[Any]) -> Iterator[Message]:
    finished = total = 0
    for event in events:
        match event:
            case StoryStarted():
                finished, total = event.finished, event.total
                yield Finished(finished, total)
            case FrameDrawn():
                finished = min(finished + 1, total)
                yield Finished(finished, total)
            case BatchHalved():
                yield Noted(f"out of memory ({event.needed}); {event.size} at once")
            case Notice():
                yield Noted(event.message)
            case StoryFinished():
                yield Drawn()


def opened(model: Any) -> Opened:
    """What a worker says of itself when its model is open."""
    from fastory.distributed.ranks import hello_of

    hello = hello_of(model)
    device = f"{model.placement.device.type} {hello.device}"
    return Opened(hello.host, device, dict(hello.models), {"fastory": __version__, **hello.versions})


def set_threads(count: int) -> None:
    """Before PyTorch is loaded: how many threads it takes, unless the user has said so."""
    from fastory.threads import COUNT

    if not any(name in os.environ for name in COUNT):
        os.environ["OMP_NUM_THREADS"] = str(count)


def stay_out_of_stdout() -> None:
    """What a library prints is no result."""
    os.dup2(2, 1)
