"""The processes of torchrun as an executor: rank 0 gives out what is to be drawn, draws its share and writes all pictures."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from fastory.distributed.channel import CPU, Channel
from fastory.distributed.launch import Launch, process_group
from fastory.distributed.messages import (
    BeginStory,
    Computing,
    Done,
    DrawFrames,
    Drawn,
    DrawStories,
    Failed,
    Hello,
    Lost,
    OutOfMemory,
    Snapshot,
    Stop,
)
from fastory.distributed.side_by_side import draw_side_by_side, taken_in
from fastory.errors import FastoryError, InputError
from fastory.events import Event
from fastory.models.protocol import Model
from fastory.modes.executor import HERE, Batch, Draw, Round, Worker
from fastory.modes.iterative import IterativeRun
from fastory.modes.mode import StoryPlan
from fastory.modes.regions import Seen
from fastory.pictures import as_picture, open_picture
from fastory.story import Story

PAUSE = 0.002  # seconds between two looks at the others, while rank 0 has nothing to draw
GOES_ON = "What is finished is kept; the same command goes on, with any number of processes."


class Rank:
    """Another process, as rank 0 sees it. hello: what it said when its model was open; story: whose frames it draws."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.hello: Hello | None = None
        self.story: IterativeRun | None = None

    @property
    def name(self) -> str:
        """For messages."""
        host = f" on {self.hello.host}" if self.hello else ""
        return f"rank {self.channel.peer}{host}"

    def message(self) -> Any:
        """The next message, or None. Raises FastoryError where the process failed or is gone."""
        message = self.channel.poll()
        match message:
            case Lost() | Stop():
                raise FastoryError(f"{self.name} ended while others went on. {GOES_ON}")
            case Failed():
                raise error_of(self.name, message)
        return message

    def stories(
        self,
        mode: str,
        model: Model,
        plans: Sequence[StoryPlan],
        *,
        batch_sizes: Sequence[int],
        size: tuple[int, int],
    ) -> Iterator[Event | None]:
        """The events of stories that this process draws; None where nothing has come yet."""
        sent = [_as_sent(plan) for plan in plans]
        self.channel.send(DrawStories(mode, sent, batch_sizes, size, computing_of(model)))
        while not isinstance(message := self.message(), Done):
            yield message.restored() if isinstance(message, Drawn) else message


class Ranks:
    """All processes of torchrun."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        """ranks: all but this one, 1, 2, .."""
        self.ranks = ranks

    @property
    def processes(self) -> int:
        """This one too."""
        return 1 + len(self.ranks)

    @property
    def workers(self) -> Sequence[Worker]:
        """Every process. The others come first: their stories cost this one no time."""
        return [*self.ranks, HERE]

    def frames(self, run: IterativeRun, round: Round, draw: Draw) -> Iterator[Event]:
        """The micro-batches dealt over the ranks; rank 0, which writes, has no more of them than another."""
        return draw_side_by_side(Shares(self.ranks, run, round, draw))


class Shares:
    """A round dealt over the ranks at once."""

    def __init__(self, ranks: Sequence[Rank], run: IterativeRun, round: Round, draw: Draw) -> None:
        """ranks: all but this one."""
        self._run, self._round = run, round
        *shares, own = deal(round.batches, 1 + len(ranks))
        self._to_lend = [(rank, share) for rank, share in zip(ranks, shares, strict=True) if share]
        self._own: Iterator[Event] | None = draw(own)
        self._drawing: list[Rank] = []

    @property
    def is_drawn_elsewhere(self) -> bool:
        """Whether a rank still draws its share."""
        return bool(self._drawing)

    def lend(self) -> None:
        """Give the other ranks their shares, those that have one; once."""
        lent, self._to_lend = self._to_lend, []
        sent = references_sent(self._run, self._round) if lent else {}
        for rank, share in lent:
            self._begin(rank)
            rank.channel.send(DrawFrames(self._round, share, sent))
            self._drawing.append(rank)

    def take(self) -> Iterator[Event] | None:
        """The share of rank 0; once."""
        own, self._own = self._own, None
        return own

    def heard(self, *, waiting: bool) -> Iterator[Event]:
        """What the ranks that draw have said. Raises MemoryError where memory ran out."""
        was_silent = True
        for rank in list(self._drawing):
            while (message := rank.message()) is not None:
                was_silent = False
                match message:
                    case Done():
                        self._drawing.remove(rank)
                        break
                    case OutOfMemory():
                        self._drawing.remove(rank)
                        raise MemoryError(f"{rank.name}: {message.needed}")
                    case Drawn():
                        yield taken_in(self._run, self._round, message)
                    case _:
                        yield message
        if waiting and was_silent:
            time.sleep(PAUSE)

    def _begin(self, rank: Rank) -> None:
        if rank.story is not self._run:
            rank.channel.send(begin_story(self._run))
            rank.story = self._run


def begin_story(run: IterativeRun) -> BeginStory:
    """A story as it travels to a process that draws frames of it."""
    characters = {name: [t.cpu() for t in tokens] for name, tokens in run.characters.items()}
    plan = replace(run.plan, story=_without_pictures(run.plan.story), finished=Snapshot(), executor=HERE)
    return BeginStory(plan, run.batch_sizes, run.size, characters, computing_of(run.model))


def references_sent(run: IterativeRun, round: Round) -> dict[int, Seen]:
    """What every frame of the last round gives those of this one, as it travels."""
    last = run.drawn.of_round(round.number - 1, run.settings.bank_size or round.frames)
    return {j: seen.to(CPU) for j, seen in last.items()}


def error_of(name: str, message: Failed) -> FastoryError:
    """The error of a process that failed, as the command line says it. name: of the process."""
    kind = InputError if message.exit_code == InputError.exit_code else FastoryError
    return kind(f"{name}: {message.message}")


def deal(batches: Sequence[Batch], processes: int) -> list[Sequence[Batch]]:
    """A share of the micro-batches for each process. The last one, which writes as well, has the smallest."""
    return [batches[first::processes] for first in range(processes)]


def computing_of(model: Model) -> Computing:
    """How this process computes just now."""
    placement = model.placement
    how = (placement.dtype_name, placement.graphs, torch.get_num_threads())
    return Computing(*how, placement.compiled, placement.attention)


def _without_pictures(story: Story) -> Story:
    """The story without pictures that are references: they are sent encoded, and other hosts may lack the files."""
    return replace(
        story, characters=tuple(replace(c, references=()) for c in story.characters), initial_pictures=()
    )


def _as_sent(plan: StoryPlan) -> StoryPlan:
    """A story with its finished pictures and its first frame, as they travel."""
    story, first = _without_pictures(plan.story), plan.story.first_frame
    if first is not None:
        story = replace(story, first_frame=as_picture(open_picture(first)))
    return replace(plan, story=story, finished=Snapshot.of(plan, plan.settings.rounds), executor=HERE)


def hello_of(model: Model) -> Hello:
    """What a process says of itself."""
    device = model.placement.device
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return Hello(
        socket.gethostname(),
        kind,
        model.hashes,
        {"torch": torch.__version__, "diffusers": version("diffusers")},
    )


def gathered(ranks: Sequence[Rank], model: Model) -> Ranks:
    """All processes, once each has opened its model. Raises InputError where one has other weights than rank 0."""
    own = hello_of(model)
    for rank in ranks:
        while (message := rank.message()) is None:
            time.sleep(PAUSE)
        assert isinstance(message, Hello)
        rank.hello = message
        check_same(rank.name, message, own, "rank 0")
    return Ranks(ranks)


def check_same(name: str, there: Hello, own: Hello, leader: str) -> None:
    """InputError where a process has other weights, libraries or devices than the one that leads. name, leader: of them."""
    for what, other, wanted in (
        ("weights of the model, its adapter or its LoRAs", there.models, own.models),
        ("versions of libraries", there.versions, own.versions),
        ("devices", there.device, own.device),
    ):
        if other != wanted:
            raise InputError(
                f"{name} has other {what} than {leader}, so a picture's bytes would depend on who drew it; wanted the same on "
                "all hosts"
            )


@contextmanager
def led(launch: Launch) -> Iterator[Callable[[Model], Ranks]]:
    """Rank 0's side of a run: all processes joined, later `gathered`, and told at the end that nothing follows."""
    with process_group(launch):
        ranks = [Rank(Channel(peer)) for peer in range(1, launch.size)]
        before = signal.signal(signal.SIGTERM, partial(_ended_by_torchrun, ranks))
        try:
            yield partial(gathered, ranks)
        except BaseException:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what went wrong is still to be said
            raise
        else:
            signal.signal(signal.SIGTERM, before)
        finally:
            for rank in ranks:
                rank.channel.close()


def _ended_by_torchrun(ranks: Sequence[Rank], *_: object) -> None:
    """SIGTERM: torchrun ends all processes when one has died. Raises FastoryError that names it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun says it more than once
    gone = [rank.name for rank in ranks if rank.channel.lost]
    raise FastoryError(f"{' and '.join(gone) or 'torchrun'} ended while others went on. {GOES_ON}")
