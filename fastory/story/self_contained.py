"""A story that needs no file beside it: it can be sent to other machines, and its run folder can be moved."""

from __future__ import annotations

from dataclasses import replace

from fastory.pictures import MemoryPicture, Picture, open_picture
from fastory.story.story import Story


def with_pictures_inside(story: Story) -> Story:
    """The story with its pictures in memory: the run folder keeps copies of them, and can be moved."""

    def inside(picture: Picture) -> MemoryPicture:
        return MemoryPicture.of(open_picture(picture))

    cast = tuple(
        replace(character, references=tuple(map(inside, character.references)))
        for character in story.characters
    )
    frames = tuple(
        replace(frame, masks=tuple((name, inside(mask)) for name, mask in frame.masks))
        for frame in story.frames
    )
    first = inside(story.first_frame) if story.first_frame else None
    initial = tuple(map(inside, story.initial_pictures))
    return replace(story, characters=cast, frames=frames, first_frame=first, initial_pictures=initial)
