"""What the processes of torchrun say to each other."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from fastory.events import FrameDrawn
from fastory.modes.executor import Batch, Round
from fastory.modes.mode import StoryPlan
from fastory.modes.regions import Seen


@dataclass(frozen=True)
class Hello:
    """A process has opened its model. device: what computes, in words. models: sha256 by file name. versions: of libraries."""

    host: str
    device: str
    models: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Computing:
    """How a run computes: dtype, graphs, compiled and attention as a Placement has them, threads of PyTorch."""

    dtype: str
    graphs: bool
    threads: int
    compiled: bool = False
    attention: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class BeginStory:
    """A story whose rounds follow. characters: the tokens of their pictures (1, T, C_x), on the CPU."""

    plan: StoryPlan
    batch_sizes: Sequence[int]
    size: tuple[int, int]
    characters: Mapping[str, Sequence[Any]]
    computing: Computing


@dataclass(frozen=True)
class DrawFrames:
    """Micro-batches of a round of that story. last: what every picture of the round before gives this one, on the CPU."""

    round: Round
    batches: Sequence[Batch]
    last: Mapping[int, Seen]


@dataclass(frozen=True)
class DrawStories:
    """Stories that are drawn side by side by the mode of this name."""

    mode: str
    plans: Sequence[StoryPlan]
    batch_sizes: Sequence[int]
    size: tuple[int, int]
    computing: Computing


@dataclass(frozen=True)
class Drawn:
    """A picture: its event without the picture, the PNG, and what it gives the next round."""

    event: FrameDrawn
    png: bytes
    seen: Seen | None = None

    @classmethod
    def of(cls, event: FrameDrawn, seen: Seen | None = None) -> Drawn:
        """As it travels."""
        return cls(replace(event, image=Image.new("RGB", (1, 1))), png_of(event.image), seen)

    def restored(self) -> FrameDrawn:
        """The event with its picture."""
        return replace(self.event, image=picture_of(self.png))


@dataclass(frozen=True)
class Done:
    """All that was to be drawn is drawn."""


@dataclass(frozen=True)
class OutOfMemory:
    """Memory ran out. needed: what the allocator said."""

    needed: str


@dataclass(frozen=True)
class Failed:
    """A process cannot go on. message, exit_code: as the command line says it."""

    message: str
    exit_code: int


@dataclass(frozen=True)
class Alive:
    """Nothing but that the process runs."""


@dataclass(frozen=True)
class Stop:
    """The last message."""


@dataclass(frozen=True)
class Lost:
    """The process at the other end is gone. reason: what the network said."""

    reason: str


@dataclass
class Snapshot:
    """The finished pictures of a story, as they travel to another process (`Finished`)."""

    pictures: dict[tuple[int, int], tuple[bytes, str | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: StoryPlan, rounds: int) -> Snapshot:
        """Every finished picture of a story."""
        keys = [(k, i) for k in range(rounds) for i in range(len(plan.prompts)) if plan.finished.has(k, i)]
        loaded = {key: plan.finished.load(*key) for key in keys}
        return cls({key: (png_of(image), left_out) for key, (image, left_out) in loaded.items()})

    def has(self, round: int, frame: int) -> bool:
        """True where the picture need not be drawn."""
        return (round, frame) in self.pictures

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        """The picture, and why it is left out as a reference."""
        png, left_out = self.pictures[round, frame]
        return picture_of(png), left_out

    def forget(self, round: int, frame: int) -> None:
        """The picture is drawn again, in a smaller micro-batch."""
        self.pictures.pop((round, frame), None)


def png_of(image: Image.Image) -> bytes:
    """A picture as PNG, which keeps every value."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def picture_of(png: bytes) -> Image.Image:
    """The picture of `png_of`."""
    image = Image.open(io.BytesIO(png))
    image.load()
    return image
