"""Where what a mode draws is computed: in this process, or in others as well. A mode is given it with the story."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fastory.events import Event

if TYPE_CHECKING:
    from fastory.models.protocol import Model
    from fastory.modes.iterative import IterativeRun
    from fastory.modes.mode import StoryPlan


@dataclass(frozen=True)
class Round:
    """What is to be drawn of a round. size: frames at once; first, frames: from where to where it goes in the story; missing:
    those that are not finished.

    staying: frames that have converged before this round, which does not draw them.
    """

    number: int
    size: int
    frames: int
    missing: frozenset[int]
    first: int = 0
    staying: frozenset[int] = frozenset()

    @property
    def batches(self) -> list[Batch]:
        """The micro-batches that hold a missing frame.

        A frame always has the same place among the same others, finished ones included: where a library's rounding depends
        on the place, a resumed run still gives the same bytes, and so does another process.
        """
        moving = [i for i in range(self.first, self.frames) if i not in self.staying]
        members = (tuple(moving[first : first + self.size]) for first in range(0, len(moving), self.size))
        return [batch for batch in members if not self.missing.isdisjoint(batch)]


Batch = tuple[int, ...]
"""The frames of a micro-batch, in their order."""

Draw = Callable[[Sequence[Batch]], Iterator[Event]]
"""Draws some of a round's micro-batches in this process; what they give the next round is added to the run."""


class Worker(Protocol):
    """Draws stories side by side."""

    def stories(
        self,
        mode: str,
        model: Model,
        plans: Sequence[StoryPlan],
        *,
        batch_sizes: Sequence[int],
        size: tuple[int, int],
    ) -> Iterator[Event | None]:
        """The events of the mode of this name, as its `draw` has them; None where nothing has come yet."""


class Executor(Protocol):
    """Processes that draw. A picture's bytes do not depend on which of them draws it."""

    @property
    def processes(self) -> int:
        """How many there are."""

    @property
    def workers(self) -> Sequence[Worker]:
        """Those that take stories which are drawn side by side."""

    def frames(self, run: IterativeRun, round: Round, draw: Draw) -> Iterator[Event]:
        """Draw the micro-batches of a round; yields events, among them every picture.

        Raises MemoryError, or what PyTorch raises, where memory ran out in any process; none of them draws by then.
        """


class Here:
    """This process alone."""

    @property
    def processes(self) -> int:
        """One."""
        return 1

    @property
    def workers(self) -> Sequence[Worker]:
        """It takes stories itself."""
        return [self]

    def frames(self, run: IterativeRun, round: Round, draw: Draw) -> Iterator[Event]:
        """One micro-batch after the other."""
        return draw(round.batches)

    def stories(
        self,
        mode: str,
        model: Model,
        plans: Sequence[StoryPlan],
        *,
        batch_sizes: Sequence[int],
        size: tuple[int, int],
    ) -> Iterator[Event | None]:
        """The mode itself."""
        from fastory.modes.mode import mode_of

        return mode_of(mode).draw(model, plans, batch_sizes=batch_sizes, size=size)


HERE = Here()
