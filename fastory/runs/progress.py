"""A bar over the denoising steps of what a program draws: tqdm's, in a notebook as in a terminal."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from fastory.events import BatchHalved, Event, FrameDrawn, RoundStarted, StepDone, StoryStarted


class StepBar:
    """Listens to events; a context manager that takes the bar away. A step of a frame counts one.

    Stories that are drawn one after the other have a bar each, those side by side one together.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._steps = 0  # of stories that begin
        self._title = ""
        self._again = (
            0  # steps that a smaller micro-batch would take again: of the round, in causal mode of the frame
        )
        self._in_round = False
        self._of_round = 0  # steps of a picture

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, event: Event) -> None:
        """One event."""
        match event:
            case StoryStarted():
                self._steps += event.steps_left
                self._title, self._in_round = event.story, False
            case RoundStarted():
                self._again, self._in_round, self._of_round = 0, True, event.steps
                self._open(f"{self._title}, round {event.round} of {event.rounds}")
            case StepDone() if not event.draft:
                self._open(None if self._in_round else self._title)
                self._advance(len(event.frames))
            case FrameDrawn() if event.converged is not None:
                self._advance(self._of_round)
            case FrameDrawn() if not self._in_round:
                self._again = 0
            case BatchHalved() if self._bar is not None:
                self._advance(-self._again)

    def _open(self, described: str | None) -> None:
        """The bar of the stories that begin, once there is something to draw."""
        if self._steps:
            self.__exit__()
            self._bar, self._steps = tqdm(desc=described, total=self._steps, unit="step"), 0
        elif described is not None and self._bar is not None:
            self._bar.set_description(described, refresh=False)

    def _advance(self, steps: int) -> None:
        self._bar.update(steps)
        self._again += steps
