"""Pictures that are given in place of a first round: Story-Adapter without initialization."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from fastory.errors import InputError
from fastory.events import FrameDrawn
from fastory.pictures import open_picture
from fastory.settings import Settings
from fastory.story import Story
from fastory.wording import counted

if TYPE_CHECKING:
    from fastory.modes.iterative import IterativeRun


def check_initial(story: Story, settings: Settings) -> None:
    """InputError for pictures that are neither one for each frame nor one for all, or that no round would see."""
    count, frames = len(story.initial_pictures), len(story.frames)
    if count not in (0, 1, frames):
        raise InputError(
            f"initial_pictures: wanted one picture for each of {counted(frames, 'frame')}, or one for all, got {count}"
        )
    if count and not settings.iterations:
        raise InputError("initial_pictures stand in place of round 0; wanted 1 iteration or more, got 0")


def initial_round(run: IterativeRun, missing: Container[int]) -> Iterator[FrameDrawn]:
    """The given pictures, cropped to the story's shape, as round 0 of the missing frames."""
    pictures = run.story.initial_pictures
    pictures *= len(run.story.frames) if len(pictures) == 1 else 1
    for i, picture in enumerate(pictures):
        if i in missing:
            image = ImageOps.fit(open_picture(picture), run.size, Image.Resampling.LANCZOS)
            run.drawn.add(0, i, image, None)
            run.drawn.keep(0, i, image)
            yield FrameDrawn(0, i, image, run.settings.seed, None)
