"""A round that is drawn here while other processes draw parts of it. Which process draws a frame decides none of its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from fastory.distributed.messages import Drawn
from fastory.events import Event
from fastory.modes.executor import Round
from fastory.modes.iterative import IterativeRun
from fastory.runtime import is_out_of_memory


class Shared(Protocol):
    """A round in parts, as this process sees it: what it draws itself, and what others draw meanwhile."""

    @property
    def is_drawn_elsewhere(self) -> bool:
        """Whether another process still draws some of it."""

    def lend(self) -> None:
        """Give others that are free something of what waits."""

    def take(self) -> Iterator[Event] | None:
        """Draws what this process is to draw next; None where nothing waits for it."""

    def heard(self, *, waiting: bool) -> Iterator[Event]:
        """What others have said. waiting: this process has nothing to draw, and may wait a moment for them.

        Raises MemoryError where memory ran out in one of them.
        """


def draw_side_by_side(shared: Shared) -> Iterator[Event]:
    """All of a round; yields its events as they come.

    Raises MemoryError, or what PyTorch raises, where memory ran out in any process, once none of them draws any more.
    """
    here: Iterator[Event] | None = None
    failure: Exception | None = None
    while True:
        if failure is None:
            shared.lend()
            here = here or shared.take()
        if here is None and not shared.is_drawn_elsewhere:
            break
        try:
            if here is not None:
                event = next(here, None)
                here = here if event is not None else None
                if event is not None:
                    yield event
            for event in shared.heard(waiting=here is None):
                if failure is None:
                    yield event
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            here, failure = None, error  # the others draw their shares to the end, in vain
    if failure is not None:
        raise failure


def taken_in(run: IterativeRun, round: Round, message: Drawn) -> Event:
    """A picture that another process has drawn: what it gives the next round is added to the run. Returns its event."""
    if message.seen is not None:
        seen = message.seen.to(run.model.placement.device)
        run.drawn.put(round.number, message.event.frame, seen)
    return message.restored()
