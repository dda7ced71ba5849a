"""An actor that draws frames of a story which another leads, made early: importing PyTorch and opening a model take long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fastory.batch.messages import Drawing
from fastory.errors import FastoryError
from fastory.wording import last_words

if TYPE_CHECKING:
    from fastory.distributed.messages import BeginStory, Failed, Hello
    from fastory.distributed.share import Answer, ShareDrawer
    from fastory.modes.executor import Batch, Round
    from fastory.modes.regions import Seen

AHEAD = 8  # pictures that an actor may be ahead of the one that leads


class FrameActor:
    """What such an actor runs. Its model is opened once, and again where Ray has started it anew."""

    def __init__(self, drawing: Drawing, device: str) -> None:
        self._open_model = partial(drawing.open_model, device)
        self._drawer: ShareDrawer | None = None
        self._story = 0

    def open(self) -> Hello | Failed:
        """Open the model."""
        from fastory.distributed.ranks import hello_of
        from fastory.distributed.share import ShareDrawer

        try:
            if self._drawer is None:
                self._drawer = ShareDrawer(self._open_model)
            return hello_of(self._drawer.model)
        except Exception as error:
            return _failed(error)

    def draw(
        self, number: int, story: BeginStory, round: Round, batches: Sequence[Batch], last: Mapping[int, Seen]
    ) -> Iterator[Answer | Failed]:
        """Draw micro-batches of the story of this number; the last message is Done, OutOfMemory or Failed."""
        from fastory.distributed.messages import DrawFrames, Failed
        from fastory.events import StepDone

        opened = self.open()
        if isinstance(opened, Failed):
            yield opened
            return
        assert self._drawer is not None
        try:
            if number != self._story:
                self._drawer.begin(story)
                self._story = number
            for answer in self._drawer.frames(DrawFrames(round, batches, last)):
                if not isinstance(answer, StepDone):  # a batch shows pictures
                    yield answer
        except Exception as error:
            yield _failed(error)


def _failed(error: Exception) -> Failed:
    from fastory.distributed.messages import Failed

    if isinstance(error, FastoryError):
        return Failed(str(error), error.exit_code)
    return Failed(last_words(error), 1)


def frame_actors(
    drawing: Drawing, device: str, count: int, options: Mapping[str, Any]
) -> list[tuple[Any, Any]]:
    """Actors, each with the opening of its model. They end with the process that makes them.

    options: of each, as Ray has them.
    """
    import ray

    methods = {
        "open": ray.method(max_task_retries=-1),
        "draw": ray.method(
            max_task_retries=0, num_returns="streaming", _generator_backpressure_num_objects=AHEAD
        ),
    }
    members = {name: method(getattr(FrameActor, name)) for name, method in methods.items()}
    kind = ray.remote(type("Frames", (FrameActor,), members)).options(**options)
    actors = [kind.remote(drawing, device) for _ in range(count)]
    return [(actor, actor.open.remote()) for actor in actors]
