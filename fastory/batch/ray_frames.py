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
from fastory.errors import FastoryError
from fastory.events import Event, FrameDrawn, Notice
from fastory.modes.executor import HERE, Batch, Draw, Round, Worker
from fastory.modes.iterative import IterativeRun, draw_batches
from fastory.runtime import is_out_of_memory

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

        self._ray = ray
        self._others = [Other(actor, opening) for actor, opening in actors]
        self._run: IterativeRun | None = None
        self._story: Any = None
        self._stories = 0
        self.was_asked = False  # whether a story had frames that could be drawn beside each other

    @property
    def processes(self) -> int:
        """This one too."""
        return 1 + len(self._others)

    @property
    def workers(self) -> Sequence[Worker]:
        """Whole stories are dealt by the batch."""
        return [HERE]

    def frames(self, run: IterativeRun, round: Round, draw: Draw) -> Iterator[Event]:
        """The micro-batches of a round, each to whoever is free."""
        self.was_asked = True
        shares = Shares(round, self.processes)
        here: Iterator[Event] | None = None
        failure: Exception | None = None
        self._lend(run, shares, kept=1)
        while True:
            if failure is None:
                if here is None and shares.are_left:
                    here = draw_batches(run, shares.left(), shares.here())
                self._lend(run, shares)
            if here is None and not any(other.shares is shares for other in self._others):
                break
            try:
                if here is not None:
                    event = next(here, None)
                    here = here if event is not None else None
                    if isinstance(event, FrameDrawn):
                        shares.drawn(event.frame)
                    if event is not None:
                        yield event
                for event in self._arrived(run, shares, PAUSE if here is None else 0.0):
                    if failure is None:
                        yield event
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                here, failure = None, error  # the others draw their shares to the end, in vain
        if failure is not None:
            raise failure

    def _lend(self, run: IterativeRun, shares: Shares, kept: int = 0) -> None:
        """Give actors that are free something of what waits. kept: micro-batches that are left."""
        for other in self._others:
            if other.is_idle and (batches := shares.lent(kept)):
                if shares.references is None:
                    shares.references = self._ray.put(references_sent(run, shares.round))
                other.shares, other.batches = shares, batches
                sent = (shares.left(), batches, shares.references)
                other.pending = other.actor.draw.remote(*self._story_of(run), *sent)

    def _story_of(self, run: IterativeRun) -> tuple[int, Any]:
        """The number of this story, and it where all actors find it, sent once."""
        if self._run is not run:
            self._run, self._stories = run, self._stories + 1
            self._story = self._ray.put(begin_story(run))
        return self._stories, self._story

    def _arrived(self, run: IterativeRun, shares: Shares, timeout: float) -> Iterator[Event]:
        """What the others have said, after at most `timeout` seconds. Raises MemoryError where memory ran out."""
        pending = [other.pending for other in self._others if other.pending is not None]
        ready = pending and self._ray.wait(pending, num_returns=1, timeout=timeout)[0]
        if ready:
            ready, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
        for other in self._others:
            if other.pending is not None and other.pending in ready:
                yield from self._heard(run, shares, other)

    def _heard(self, run: IterativeRun, shares: Shares, other: Other) -> Iterator[Event]:
        is_this, opening = other.shares is shares, not other.is_open
        try:
            message = self._ray.get(other.pending if opening else next(other.pending))
        except (self._ray.exceptions.RayError, StopIteration):
            other.lost()
            notice = shares.give_back(other.batches) if is_this else None
            if notice is not None:
                yield notice
            return
        match message:
            case Failed():
                other.shares, other.pending = None, None
                raise error_of("an actor", message)
            case Hello():
                check_same(f"an actor on {message.host}", message, hello_of(run.model), "the one that leads")
                other.is_open, other.pending = True, None
            case Done():
                other.shares, other.pending = None, None
            case OutOfMemory():
                other.shares, other.pending = None, None
                if is_this:
                    raise MemoryError(f"an actor: {message.needed}")
            case Drawn() if is_this:
                yield self._restored(run, shares, message)
            case _ if is_this:
                yield message

    def _restored(self, run: IterativeRun, shares: Shares, message: Drawn) -> Event:
        if message.seen is not None:
            seen = message.seen.to(run.model.placement.device)
            run.drawn.put(shares.round.number, message.event.frame, seen)
        shares.drawn(message.event.frame)
        return message.restored()
