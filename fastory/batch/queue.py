"""The queue of a batch: workers are given stories until none is left, whatever becomes of a worker or of a story."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from fastory.batch.messages import (
    BatchFinished,
    BatchNotice,
    BatchProgress,
    BatchStarted,
    Checked,
    CheckStories,
    Drawn,
    DrawStory,
    Finished,
    Lost,
    Message,
    Noted,
    NotOpened,
    Opened,
    Refused,
    StoryDone,
    StoryFailed,
    Task,
    WorkerLost,
    WorkerReady,
)
from fastory.batch.record import BatchFolder
from fastory.batch.stories import BatchStory, refused
from fastory.errors import FastoryError, InputError

ATTEMPTS = 3  # that a story has without a new picture: one whose worker dies this often is what kills it
CHECKED_AT_ONCE = 32  # stories
LOOK = 0.5  # seconds between two looks at workers of which none says anything

Event = (
    BatchStarted
    | WorkerReady
    | WorkerLost
    | BatchNotice
    | BatchProgress
    | StoryDone
    | StoryFailed
    | BatchFinished
)


class Worker(Protocol):
    """A process that draws a story at a time."""

    name: str

    def send(self, task: Task) -> None:
        """Give it something to do; what becomes of it, its messages say."""


class Workers(Protocol):
    """All workers of a batch. One that ended comes back by itself, and says Opened again."""

    @property
    def workers(self) -> Sequence[Worker]:
        """Those there are now."""

    def wait(self, timeout: float) -> Iterator[tuple[Worker, Message]]:
        """What they have said, after at most `timeout` seconds."""

    def close(self) -> None:
        """End all of them."""


class NoWorkers:
    """Where nothing is left to be drawn."""

    workers: Sequence[Worker] = ()

    def wait(self, timeout: float) -> Iterator[tuple[Worker, Message]]:
        """Nothing."""
        return iter(())

    def close(self) -> None:
        """There is nothing to end."""


class Queue:
    """Draws the stories of a batch that are not done."""

    def __init__(self, stories: Sequence[BatchStory], folder: BatchFolder, workers: Workers) -> None:
        """folder: locked; who made it closes it."""
        self._stories = {story.name: story for story in stories}
        self._folder, self._workers = folder, workers
        self._waiting = deque(folder.left())
        self._unchecked = deque(self._waiting)
        self._checking: dict[str, Sequence[str]] = {}  # by worker
        self._drawing: dict[str, str] = {}
        self._since: dict[str, float] = {}
        self._idle: dict[str, Worker] = {}
        self._devices: dict[str, str] = {}
        self._versions: Mapping[str, str] = {}
        self._refused: dict[str, str] = {}
        self._attempts: Counter[str] = Counter()
        self._reached: dict[str, int] = {}  # finished pictures
        self._unopened = 0  # workers that were lost, one after the other, before any model was open
        self._failed = 0
        self._estimate = Estimate({name: len(self._stories[name].story.frames) for name in self._waiting})

    def draw(self) -> Iterator[Event]:
        """Until every story is done or has failed. Raises InputError, before anything is drawn, for stories that the model

        cannot draw, and for a model that cannot be opened; FastoryError where the disk fails, or no worker lives long enough
        to open its model.
        """
        started = time.monotonic()
        yield BatchStarted(self._folder.shown(), len(self._stories), self._done(), len(self._workers.workers))
        try:
            while self._unchecked or self._checking or self._waiting or self._drawing:
                self._give()
                for worker, message in self._workers.wait(LOOK):
                    yield from self._heard(worker, message)
        finally:
            self._workers.close()
            self._folder.save(at_once=True)
        yield BatchFinished(self._folder.shown(), self._done(), self._failed, time.monotonic() - started)

    def _done(self) -> int:
        return len(self._stories) - len(self._waiting) - len(self._drawing) - self._failed

    def _give(self) -> None:
        """Every worker that has nothing to do gets something: stories to check, and once all are checked, one to draw."""
        for name, worker in list(self._idle.items()):
            if self._unchecked:
                chosen = [
                    self._unchecked.popleft() for _ in range(min(CHECKED_AT_ONCE, len(self._unchecked)))
                ]
                self._checking[name] = chosen
                worker.send(CheckStories({story: self._stories[story].story for story in chosen}))
            elif self._checking:
                break
            elif self._refused:
                raise refused(self._refused, self._stories)
            elif self._waiting:
                story = self._waiting.popleft()
                self._drawing[name], self._since[story] = story, time.monotonic()
                worker.send(DrawStory(story, self._stories[story].story, self._folder.run(story)))
            else:
                break
            del self._idle[name]

    def _heard(self, worker: Worker, message: Message) -> Iterator[Event]:
        match message:
            case Opened():
                yield from self._opened(worker, message)
            case NotOpened():
                kind = InputError if message.exit_code == InputError.exit_code else FastoryError
                raise kind(message.message)
            case Checked():
                del self._checking[worker.name]
                self._refused.update(message.refused)
                self._idle[worker.name] = worker
            case Lost():
                yield from self._lost(worker, message.reason)
            case _ if worker.name in self._drawing:
                yield from self._of_story(worker, self._drawing[worker.name], message)

    def _opened(self, worker: Worker, message: Opened) -> Iterator[Event]:
        self._folder.begin_with(message.models)
        self._versions = self._versions or message.versions
        if message.versions != self._versions:
            raise InputError(
                f"{worker.name} on {message.host} has {_listed(message.versions)}, another {_listed(self._versions)}; wanted "
                "the same on all hosts, as a picture's bytes depend on them"
            )
        self._unopened = 0
        others = set(self._devices.values()) - {message.device}
        known = message.device in self._devices.values()
        self._devices[worker.name] = message.device
        self._idle[worker.name] = worker
        yield WorkerReady(worker.name, message.host, message.device)
        if others and not known:
            yield BatchNotice(
                None,
                f"{worker.name} computes on {message.device}, others on {', '.join(sorted(others))}: the last bits of a "
                "story's pictures depend on which of them draws it",
            )

    def _of_story(self, worker: Worker, story: str, message: Message) -> Iterator[Event]:
        match message:
            case Finished():
                if message.finished > self._reached.get(story, 0):
                    self._attempts[story] = 0  # whoever ends workers, it is not this story
                self._reached[story] = message.finished
                self._estimate.note(story, message.finished, message.total)
                left = self._estimate.seconds_left()
                yield BatchProgress(story, worker.name, message.finished, message.total, left)
            case Noted():
                yield BatchNotice(story, message.message)
            case Drawn():
                del self._drawing[worker.name]
                self._idle[worker.name] = worker
                self._estimate.drop(story)
                seconds = round(time.monotonic() - self._since[story], 3)
                device = self._devices[worker.name]
                self._folder.settle(story, state="done", seconds=seconds, device=device)
                path, counts = self._folder.shown(story), self._counts()
                yield StoryDone(story, path, seconds, *counts, self._estimate.seconds_left())
            case Refused():
                del self._drawing[worker.name]
                if message.disk:
                    self._waiting.appendleft(story)
                    raise FastoryError(message.message)
                self._idle[worker.name] = worker
                yield from self._fail(story, message.message)

    def _lost(self, worker: Worker, reason: str) -> Iterator[Event]:
        self._idle.pop(worker.name, None)
        if worker.name not in self._devices:
            self._unopened += 1
            if self._unopened >= ATTEMPTS:
                raise FastoryError(
                    f"{worker.name} {reason}, as {self._unopened} times before its model was open"
                )
        self._devices.pop(worker.name, None)
        self._unchecked.extendleft(self._checking.pop(worker.name, ()))
        story = self._drawing.pop(worker.name, None)
        yield WorkerLost(worker.name, story, reason)
        if story is None:
            return
        self._attempts[story] += 1
        if self._attempts[story] < ATTEMPTS:
            self._waiting.appendleft(story)
        else:
            yield from self._fail(story, f"the worker that draws it {reason}, {ATTEMPTS} times")

    def _fail(self, story: str, reason: str) -> Iterator[Event]:
        self._failed += 1
        self._estimate.drop(story)
        self._folder.settle(story, state="failed", reason=reason)
        yield StoryFailed(story, reason, *self._counts())

    def _counts(self) -> tuple[int, int, int]:
        """Stories that are done, failed and left."""
        return self._done(), self._failed, len(self._waiting) + len(self._drawing)


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


class Estimate:
    """How long the batch goes on, from the pictures that were drawn since it began."""

    def __init__(self, frames: dict[str, int]) -> None:
        """frames: of every story that is left."""
        self._frames = frames
        self._left: dict[str, int] = {}  # pictures of stories that were begun
        self._rounds = 0.0  # pictures of a frame, in the stories seen so far
        self._drawn = 0
        self._since = 0.0

    def note(self, story: str, finished: int, total: int) -> None:
        """A story has `finished` of `total` pictures."""
        if story not in self._left:
            self._rounds = max(self._rounds, total / self._frames[story])
            self._since = self._since or time.monotonic()
        else:
            self._drawn += max(0, self._left[story] - (total - finished))
        self._left[story] = total - finished

    def drop(self, story: str) -> None:
        """Nothing of a story is left."""
        self._frames.pop(story, None)
        self._left.pop(story, None)

    def seconds_left(self) -> float | None:
        """None before a picture was drawn."""
        if not self._drawn:
            return None
        waiting = sum(frames for story, frames in self._frames.items() if story not in self._left)
        pictures = sum(self._left.values()) + waiting * self._rounds
        return round((time.monotonic() - self._since) / self._drawn * pictures, 1)
