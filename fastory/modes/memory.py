"""When memory runs out: what was being drawn begins again with half as much at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar

from fastory.errors import FastoryError
from fastory.events import BatchHalved, Event
from fastory.models.protocol import Model
from fastory.runtime import is_out_of_memory, release_memory
from fastory.sampling.sampler import Sampler

Drawn = TypeVar("Drawn")


class Drawing(Protocol):
    """What is being drawn: a story round by round, or stories frame by frame.

    batch_sizes: frames (or stories) at once in round (or at frame) 0, 1, ..; the last entry stands for all later ones.
    halved: what was left when memory ran out.
    """

    model: Model
    batch_sizes: Sequence[int]
    halved: int | None
    sampler: Sampler | None


def batch_size(drawing: Drawing, turn: int) -> int:
    """At once in round, or at frame, `turn`: as given, or what was left when memory ran out."""
    size = drawing.batch_sizes[min(turn, len(drawing.batch_sizes) - 1)]
    return size if drawing.halved is None else min(size, drawing.halved)


def until_it_fits(
    drawing: Drawing,
    draw: Callable[[int], Generator[Event, None, Drawn]],
    round: int,
    frame: int | None = None,
) -> Generator[Event, None, Drawn]:
    """draw(size) of a round, begun again with half the size each time memory runs out; returns what `draw` returns.

    frame: in causal mode, the frame of all stories that is drawn. Raises FastoryError where one at a time is too much.
    """
    while True:
        size = batch_size(drawing, round if frame is None else frame)
        try:
            return (yield from draw(size))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            needed = str(error).splitlines()[0] if str(error) else type(error).__name__
            if size == 1:
                raise FastoryError(one_is_too_much(round, frame, needed)) from None
        drawing.sampler = None
        release_memory(drawing.model.placement.device)
        drawing.halved = size // 2
        yield BatchHalved(round, drawing.halved, needed, frame)


def one_is_too_much(round: int, frame: int | None, needed: str) -> str:
    """What to do about it, for the user."""
    if frame is None:
        where, window = f"in round {round} with one frame", ""
    else:
        where, window = f"at frame {frame} with one story", "a smaller --window, "
    return (
        f"out of memory {where} at a time ({needed}). What helps: a smaller --width and --height, {window}--dtype float16 "
        "on a GPU, fewer programs beside this one, or a device with more memory. The finished pictures are kept; the same "
        "command goes on from them."
    )
