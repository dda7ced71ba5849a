"""What happens while stories are drawn, as data. `Event` is the public union; `as_json` gives one line for one event."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from PIL import Image

SCHEMA = 1


@dataclass(frozen=True)
class StoryStarted:
    """A story begins (or is taken up again: `finished` pictures of `total` lie in the run folder).

    steps: of a picture of the last round. steps_left: of all pictures that are missing. story_index: in the call.
    """

    story: str
    frames: int
    rounds: int
    steps: int
    finished: int
    total: int
    folder: Path | None
    story_index: int = 0
    steps_left: int = 0


@dataclass(frozen=True)
class BatchChosen:
    """Frames denoised at once, and why this many."""

    size: int
    reason: str


@dataclass(frozen=True)
class Notice:
    """Something the user should know; drawing goes on."""

    message: str


@dataclass(frozen=True)
class Compiling:
    """Parts of the UNet are compiled before the first step that wants them: `done` of `total` are there."""

    done: int
    total: int


@dataclass(frozen=True)
class RoundStarted:
    """Round 0 draws from the captions alone; `reference_scale` is l_k of the later ones.

    steps: of a picture of this round.
    """

    round: int
    rounds: int
    reference_scale: float
    frames: int
    steps: int = 0


@dataclass(frozen=True)
class StepDone:
    """One denoising step of one micro-batch: `frames` are the story's frames in it, `step` counts from 1.

    seconds: what the step took on its device, which on CUDA has done it when the event comes.
    story_index: of the story in the call; causal mode draws several side by side. draft: of frame 0, counted from 1; 0 is the
    frame itself.
    """

    round: int
    frames: tuple[int, ...]
    step: int
    steps: int
    seconds: float
    story_index: int = 0
    draft: int = 0


@dataclass(frozen=True)
class FrameDrawn:
    """A finished picture, 8-bit RGB. `left_out` says why it is never a reference, or is None. story_index: as in StepDone.

    converged: the round in which the frame was finished, whose picture this one is, too (--until converged), or None.
    """

    round: int
    frame: int
    image: Image.Image
    seed: int
    left_out: str | None
    path: Path | None = None
    story_index: int = 0
    converged: int | None = None


@dataclass(frozen=True)
class BatchHalved:
    """Memory ran out: the round starts again with `size` frames at once. `needed` quotes the allocator.

    frame: in causal mode, the frame that starts again, with `size` stories at once.
    """

    round: int
    size: int
    needed: str
    frame: int | None = None


@dataclass(frozen=True)
class RoundFinished:
    """All frames of a round are drawn."""

    round: int
    rounds: int
    seconds: float


@dataclass(frozen=True)
class StoryFinished:
    """A story is complete. The paths are None where no run folder was asked for."""

    story: str
    folder: Path | None
    sheet: Path | None
    storybook: Path | None
    seconds: float


Event = (
    StoryStarted
    | BatchChosen
    | Notice
    | Compiling
    | RoundStarted
    | StepDone
    | FrameDrawn
    | BatchHalved
    | RoundFinished
    | StoryFinished
)


def as_json(event: Any) -> str:
    """One line of JSON: `schema`, `event` (the class name) and the fields; a picture is given by its path alone.

    event: of `Event`, or a dataclass that another command reports.
    """
    values: dict[str, Any] = {"schema": SCHEMA, "event": type(event).__name__}
    for field in fields(event):
        value = getattr(event, field.name)
        if not isinstance(value, Image.Image):
            values[field.name] = value
    return json.dumps(values, ensure_ascii=False, default=_jsonable)


def _jsonable(value: Any) -> Any:
    """What json has no form for: paths, and dataclasses within events."""
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"an event holds a {type(value).__name__}, which has no form in JSON")
