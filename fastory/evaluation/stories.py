"""What is evaluated: a run folder of any mode, or a folder with a story file and a picture for every frame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastory.errors import InputError
from fastory.story import STORY_FILES, Story


@dataclass(frozen=True)
class DrawnStory:
    """One story with its pictures. captions: raw, as the story file has them, without style and descriptions."""

    folder: Path
    title: str
    captions: tuple[str, ...]
    pictures: tuple[Path, ...]


def read_drawn(folder: Path) -> DrawnStory:
    """The story of one folder: story.yaml (.yml, .json, .txt) beside frames/frame-000.png .. or frame-000.png ..

    Raises InputError for a folder without a story file. Whether each picture can be read is seen when it is.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: wanted a run folder, or a folder with a story and its pictures; there is none"
        )
    file = next((folder / name for name in STORY_FILES if (folder / name).is_file()), None)
    if file is None:
        raise InputError(
            f"{folder}: wanted a story file ({', '.join(STORY_FILES)}) beside the pictures, got none"
        )
    story = Story.read(file)
    inside = folder / "frames" if (folder / "frames").is_dir() else folder
    pictures = tuple(inside / f"frame-{i:03d}.png" for i in range(len(story.frames)))
    return DrawnStory(folder, story.title, tuple(frame.caption for frame in story.frames), pictures)
