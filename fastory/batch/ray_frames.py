"""A story over several of Ray's actors: the one that draws it lends micro-batches of its rounds to others.

A round is a map over frames, and which actor draws a frame decides none of its bytes. Whoever is free takes what waits, so
that a slow actor has less to do; an actor that ends loses what it was lent, and another draws it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastory.distributed.messages import Done, Drawn, Failed, Hello, OutOfMemory
from fastory.distributed.ranks import begin_story, check_same, error_of, hello_of, references_sent
from fastory.distributed.side_by_side import draw_side_by_side, taken_in
from fastory.errors import FastoryError
from fastory.events import Event, FrameDrawn, Notice
from fastory.modes.executor import HERE, Batch, Draw, Round, Worker
from fastory.modes.iterative import IterativeRun, draw_batches

ATTEMPTS = 3  # of a micro-batch: that many actors may end with it
PAUSE = 0.05  # seconds to wait for the others, where nothing is left to be drawn here


class Shares:
    """The micro-batches of a round: those that wait, and which frames are not drawn yet. references: where actors find them."""

    def __init__(self, round: Round, processes: int) -> None:
        self.round, self._processes = round, processes
        self.references: Any = None
        self._waiting: deque[Batch] = deque(round.batches)
        self._lost: deque[Batch] = deque()
        self._missing = set(round.missing)
        self._attempts: Counter[Batch] = Counter()

    @property
    def are_left(self) -> bool:
        """Whether micro-batches wait for somebody."""
        return bool(self._waiting or self._lost)

    def here(self) -> Iterator[Batch]:
        """Micro-batches for this process: all that were lost with an actor, else one after the other while any waits.

        What is lost later waits for the next call, as the frames that are left of it are others.
        """
        if self._lost:
            taken, self._lost = self._lost, deque()
            return iter(taken)
        return iter(self._next, None)

    def _next(self) -> Batch | None:
        return self._waiting.popleft() if self._waiting else None

    def lent(self, kept: int) -> list[Batch]:
        """Some for an actor: several while many wait, in the end single ones. kept: so many are left."""
        if self._lost:
            return [self._lost.popleft()]
        most = -(-len(self._waiting) // (2 * self._processes))
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting) - kept))]

    def left(self) -> Round:
        """The round without the frames that are drawn."""
        return replace(self.round, missing=frozenset(self._missing))

    def drawn(self, frame: int) -> None:
        """A frame is drawn."""
        self._missing.discard(frame)

    def give_back(self, batches: Sequence[Batch]) -> Notice | None:
        """What an actor was lent when it ended. Raises FastoryError for a micro-batch with which one ends every time."""
        again = [batch for batch in batches if not self._missing.isdisjoint(batch)]
        if not again:
            return None
        # An actor draws in this order: whichever micro-batch ended it, it is the first that has frames left.
        self._attempts[again[0]] += 1
        round = f"of round {self.round.number}"
        if self._attempts[again[0]] >= ATTEMPTS:
            raise FastoryError(
                f"an actor ended while it drew {frames_of(again[0])} {round}, {ATTEMPTS} times"
            )
        self._lost.extend(again)
        frames = frames_of([frame for batch in again for frame in batch])
        return Notice(f"an actor ended while it drew {frames} {round}, which another draws again")


def frames_of(frames: Sequence[int]) -> str:
    """For messages."""
    return f"frame {frames[0]}" if len(frames) == 1 else f"frames {frames[0]}-{frames[-1]}"


class Other:
    """Another actor, as the one that leads sees it. pending: what it was asked last; shares, batches: what it was lent."""

    def __init__(self, actor: Any, opening: Any) -> None:
        self.actor, self.pending = actor, opening
        self.is_open = False
        self.unopened = 0  # how often it ended before its model was open
        self.shares: Shares | None = None
        self.batches: Sequence[Batch] = ()

    @property
    def is_idle(self) -> bool:
        """Whether it can be lent something."""
        return self.is_open and self.shares is None

    def lost(self) -> None:
        """It ended: wait until Ray has started it anew, wherever that is, unless it never gets as far as its model."""
        self.unopened = 0 if self.is_open else self.unopened + 1
        self.is_open, self.shares = False, None
        self.pending = self.actor.open.remote() if self.unopened < ATTEMPTS else None


class FrameActors:
    """Other actors as an executor."""

    def __init__(self, actors: Sequence[tuple[Any, Any]]) -> None:
        """actors: with what each was asked first, to open its model (`frame_actors`)."""
        import ray

        self.ray = ray
        self.others = [Other(actor, opening) for actor, opening in actors]
        self._run: IterativeRun | None = None
        self._story: Any = None
        self._stories = 0
        self.was_asked = False  # whether a story had frames that could be drawn beside each other

    @property
    def processes(self) -> int:
        """This one too."""
        return 1 + len(self.others)

    @property
    def workers(self) -> Sequence[Worker]:
        """Whole stories are dealt by the batch."""
        return [HERE]

    def frames(self, run: IterativeRun, round: Round, draw: Draw) -> Iterator[Event]:
        """The micro-batches of a round, each to whoever is free."""
        self.was_asked = True
        return draw_side_by_side(SharedRound(self, run, round))

    def story_of(self, run: IterativeRun) -> tuple[int, Any]:
        """The number of this story, and it where all actors find it, sent once."""
        if self._run is not run:
            self._run, self._stories = run, self._stories + 1
            self._story = self.ray.put(begin_story(run))
        return self._stories, self._story


class SharedRound:
    """A round of which every actor that is free takes some."""

    def __init__(self, actors: FrameActors, run: IterativeRun, round: Round) -> None:
        """actors: all others."""
        self._actors, self._run = actors, run
        self._ray, self._others = actors.ray, actors.others
        self._shares = Shares(round, actors.processes)
        self._kept = 1  # for this process, until it has taken its first

    @property
    def is_drawn_elsewhere(self) -> bool:
        """Whether an actor still draws some of it."""
        return any(other.shares is self._shares for other in self._others)

    def lend(self) -> None:
        """Give actors that are free something of what waits."""
        run, shares = self._run, self._shares
        for other in self._others:
            if other.is_idle and (batches := shares.lent(self._kept)):
                if shares.references is None:
                    shares.references = self._ray.put(references_sent(run, shares.round))
                other.shares, other.batches = shares, batches
                sent = (shares.left(), batches, shares.references)
                other.pending = other.actor.draw.remote(*self._actors.story_of(run), *sent)
        self._kept = 0

    def take(self) -> Iterator[Event] | None:
        """Draws what waits, micro-batch after micro-batch, or all that was lost with an actor."""
        return self._drawn_here() if self._shares.are_left else None

    def _drawn_here(self) -> Iterator[Event]:
        shares = self._shares
        for event in draw_batches(self._run, shares.left(), shares.here()):
            if isinstance(event, FrameDrawn):
                shares.drawn(event.frame)
            yield event

    def heard(self, *, waiting: bool) -> Iterator[Event]:
        """What the others have said. Raises MemoryError where memory ran out."""
        pending = [other.pending for other in self._others if other.pending is not None]
        ready = pending and self._ray.wait(pending, num_returns=1, timeout=PAUSE if waiting else 0.0)[0]
        if ready:
            ready, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
        for other in self._others:
            if other.pending is not None and other.pending in ready:
                yield from self._said_by(other)

    def _said_by(self, other: Other) -> Iterator[Event]:
        is_this, opening = other.shares is self._shares, not other.is_open
        try:
            message = self._ray.get(other.pending if opening else next(other.pending))
        except (self._ray.exceptions.RayError, StopIteration):
            other.lost()
            notice = self._shares.give_back(other.batches) if is_this else None
            if notice is not None:
                yield notice
            return
        match message:
            case Failed():
                other.shares, other.pending = None, None
                raise error_of("an actor", message)
            case Hello():
                own = hello_of(self._run.model)
                check_same(f"an actor on {message.host}", message, own, "the one that leads")
                other.is_open, other.pending = True, None
            case Done():
                other.shares, other.pending = None, None
            case OutOfMemory():
                other.shares, other.pending = None, None
                if is_this:
                    raise MemoryError(f"an actor: {message.needed}")
            case Drawn() if is_this:
                self._shares.drawn(message.event.frame)
                yield taken_in(self._run, self._shares.round, message)
            case _ if is_this:
                yield message
