"""What a batch tells its user, as events, and what it and its workers say to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastory.story import Story

# -- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchStarted:
    """The queue stands: `done` of `stories` were finished before. workers: processes that draw."""

    folder: Path | str
    stories: int
    done: int
    workers: int


@dataclass(frozen=True)
class WorkerReady:
    """A worker has opened its model. device: what computes, in words."""

    worker: str
    host: str
    device: str


@dataclass(frozen=True)
class WorkerLost:
    """A worker ended while it drew `story` (or None), which waits again; another takes its place."""

    worker: str
    story: str | None
    reason: str


@dataclass(frozen=True)
class BatchNotice:
    """Something the user should know; drawing goes on. story: None for what concerns them all."""

    story: str | None
    message: str


@dataclass(frozen=True)
class BatchProgress:
    """A story's pictures: `finished` of `total`. seconds_left: of the whole batch, None before it can be told."""

    story: str
    worker: str
    finished: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True)
class StoryDone:
    """A story's run folder is complete. done, failed, left: stories of this command. seconds: since a worker took it."""

    story: str
    folder: Path | str
    seconds: float
    done: int
    failed: int
    left: int
    seconds_left: float | None


@dataclass(frozen=True)
class StoryFailed:
    """A story cannot be drawn; the others go on."""

    story: str
    reason: str
    done: int
    failed: int
    left: int


@dataclass(frozen=True)
class BatchFinished:
    """Nothing is left to be drawn."""

    folder: Path | str
    done: int
    failed: int
    seconds: float


# -- to a worker -------------------------------------------------------------------------------------------------

Open = Callable[..., Any]
"""open(device, dtype=None, graphs=None): opens the model; None for what the command line says."""


@dataclass(frozen=True)
class Drawing:
    """How the stories of a batch are drawn, sent to every worker once. arguments: of fastory.generate, for each story."""

    open_model: Open
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CheckStories:
    """Stories that the model has to be asked about before anything is drawn, by name."""

    stories: Mapping[str, Story]


@dataclass(frozen=True)
class DrawStory:
    """A story to be drawn into a run folder, which goes on where it has begun."""

    name: str
    story: Story
    folder: Path


Task = CheckStories | DrawStory

# -- from a worker -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """The model is open. device: what computes, in words; models: sha256 by file name; versions: of libraries."""

    host: str
    device: str
    models: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class NotOpened:
    """The model cannot be opened. message, exit_code: as the command line says it."""

    message: str
    exit_code: int


@dataclass(frozen=True)
class Checked:
    """Stories were checked against the model. refused: what is wrong, by name."""

    refused: Mapping[str, str]


@dataclass(frozen=True)
class Finished:
    """Pictures of the story that are finished, of all."""

    finished: int
    total: int


@dataclass(frozen=True)
class Noted:
    """Something the user should know of the story."""

    message: str


@dataclass(frozen=True)
class Drawn:
    """The run folder is complete."""


@dataclass(frozen=True)
class Refused:
    """The story cannot be drawn. disk: whether it is the disk that failed, and would fail the next story, too."""

    message: str
    exit_code: int
    disk: bool = False


@dataclass(frozen=True)
class Lost:
    """The worker's process is gone; another is started."""

    reason: str


Message = Opened | NotOpened | Checked | Finished | Noted | Drawn | Refused | Lost
