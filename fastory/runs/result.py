"""A story drawn to its end, for programs that want its pictures and no events."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from fastory.errors import InputError
from fastory.events import FrameDrawn, Notice, StoryFinished, StoryStarted
from fastory.pictures import open_picture
from fastory.runs.generate import generate
from fastory.runs.manifest import picture_name
from fastory.story import Story, are_captions

# What a notebook shows: pixels of a picture's sides at most, pictures in a row, pixels between them.
TILE, COLUMNS, GAP = (256, 256), 6, 4


@dataclass(frozen=True)
class Drawing:
    """A drawn story. rounds: every round's pictures, 8-bit RGB, the last ones the final ones; causal mode has one round.

    folder: the run folder, or None where nothing was written. notices: what the user should know.
    """

    rounds: list[list[Image.Image]]
    folder: Path | None
    notices: list[str]

    @property
    def images(self) -> list[Image.Image]:
        """The final pictures, one a frame."""
        return self.rounds[-1]

    def _repr_png_(self) -> bytes:
        """The final pictures in rows, as a notebook shows the result of a cell."""
        small = [
            ImageOps.contain(image, TILE) if max(image.size) > max(TILE) else image for image in self.images
        ]
        columns = min(len(small), COLUMNS)
        width, height = (max(sides) + GAP for sides in zip(*(image.size for image in small), strict=True))
        rows = -(-len(small) // columns)
        canvas = Image.new("RGB", (columns * width - GAP, rows * height - GAP), "white")
        for n, image in enumerate(small):
            canvas.paste(image, (n % columns * width, n // columns * height))
        written = io.BytesIO()
        canvas.save(written, "PNG")
        return written.getvalue()


def draw(story: Story | str | Path | Sequence[str], *, progress: bool = True, **options: Any) -> Drawing:
    """Draw one story and return its pictures.

    story: a Story, a story file, or captions. progress: a bar over the denoising steps, in a notebook too. options: as for
    `generate`, single fields of Settings among them. Pictures of an earlier run in the folder `output` are in the result, too.
    All rounds are kept in memory: for a long story in large pictures, take them one by one from `generate`.
    """
    if not isinstance(story, (Story, str, Path)) and not are_captions(list(story)):
        raise InputError("draw takes one story: a Story, a file, or captions; for several, use generate")
    drawn: dict[tuple[int, int], Image.Image] = {}
    notices: list[str] = []
    started: StoryStarted | None = None
    folder: Path | None = None
    for event in generate(story, progress=progress, **options):
        match event:
            case StoryStarted():
                started = event
            case FrameDrawn() if event.path is None:
                drawn[event.round, event.frame] = event.image
            case Notice():
                notices.append(event.message)
            case StoryFinished():
                folder = event.folder
    assert started is not None
    rounds = [
        [
            drawn[k, i] if folder is None else open_picture(folder / picture_name(k, i))
            for i in range(started.frames)
        ]
        for k in range(started.rounds)
    ]
    return Drawing(rounds, folder, notices)
