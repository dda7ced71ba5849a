"""What is evaluated: a run folder of any mode, or a folder with a story file and a picture for every frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastory.builtin.words import SPECIES_WORDS, words
from fastory.errors import InputError
from fastory.pictures import MemoryPicture
from fastory.story import STORY_FILES, Story

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class DrawnCharacter:
    """A character as a story annotates it.

    phrase: what a detector is asked for, of which metrics use the last word. frames: in which it is said to be. boxes: where
    it stands there, as shares of the picture (left, top, right, bottom), where the story says so. references: pictures of it.
    """

    name: str
    phrase: str
    frames: tuple[int, ...]
    boxes: Mapping[int, Box] = field(default_factory=dict)
    references: tuple[Path, ...] = ()

    @property
    def noun(self) -> str:
        """The last word of the phrase: what TheaterGen's evaluation asks a detector for."""
        return self.phrase.split()[-1].strip(".,;:!?")


@dataclass(frozen=True)
class DrawnStory:
    """One story with its pictures. captions: raw, as the story file has them, without style and descriptions.

    prompts: the same with the characters described. story: what it was read from.
    """

    folder: Path
    title: str
    captions: tuple[str, ...]
    pictures: tuple[Path, ...]
    prompts: tuple[str, ...] = ()
    characters: tuple[DrawnCharacter, ...] = ()
    story: Story | None = None


def story_file(folder: Path) -> Path | None:
    """story.yaml (.yml, .json, .txt) of a folder, where there is one."""
    return next((folder / name for name in STORY_FILES if (folder / name).is_file()), None)


def read_drawn(folder: Path, named: Path | None = None) -> list[DrawnStory]:
    """The stories of a folder: one with a story file beside its pictures, or a run of ViStoryBench with several.

    Pictures: frames/frame-000.png .. or frame-000.png .., or shots/00.png ..; a run of ViStoryBench holds stories that are
    called 01, 02 and so on. named: a folder of story files, called as the stories' folders, for those without one of their own.
    Raises InputError for a folder without a story. Whether each picture can be read is seen when it is.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: wanted a run folder, or a folder with a story and its pictures; there is none"
        )
    numbered = sorted((path for path in folder.iterdir() if (path / "shots").is_dir()), key=_number)
    if numbered and story_file(folder) is None:
        return [_read_one(path, named) for path in numbered]
    return [_read_one(folder, named)]


def _number(path: Path) -> tuple[int, str]:
    """Of a story of ViStoryBench, by number and not by letters: 9 before 10."""
    return (int(path.name) if path.name.isdecimal() else 0), path.name


def _read_one(folder: Path, named: Path | None) -> DrawnStory:
    elsewhere = [named / f"{folder.name}{Path(name).suffix}" for name in STORY_FILES] if named else []
    file = story_file(folder) or next((path for path in elsewhere if path.is_file()), None)
    if file is None:
        where = (
            f", or {named / folder.name}.yaml" if named else ", or --captions with a folder of story files"
        )
        raise InputError(
            f"{folder}: wanted a story file ({', '.join(STORY_FILES)}) beside the pictures{where}; got none"
        )
    story = Story.read(file)
    count = range(len(story.frames))
    if (folder / "shots").is_dir():
        return drawn_story(story, folder, tuple(folder / "shots" / f"{i:02d}.png" for i in count))
    inside = folder / "frames" if (folder / "frames").is_dir() else folder
    return drawn_story(story, folder, tuple(inside / f"frame-{i:03d}.png" for i in count))


def drawn_story(story: Story, folder: Path, pictures: Sequence[Path]) -> DrawnStory:
    """A story with its pictures, one a frame."""
    captions = tuple(frame.caption for frame in story.frames)
    prompts = tuple(story.prompt(i, "none") for i in range(len(captions)))
    return DrawnStory(
        folder, story.title, captions, tuple(pictures), prompts, tuple(_characters(story)), story
    )


def _characters(story: Story) -> list[DrawnCharacter]:
    """Those of `characters:`; in a story that lists none, the animals of the drawn world that captions name."""
    if not story.characters:
        return _animals(story)
    found = []
    for character in story.characters:
        frames = tuple(i for i in range(len(story.frames)) if character.name in story.cast(i))
        placed = {i: dict(frame.boxes).get(character.name) for i, frame in enumerate(story.frames)}
        boxes = {i: box for i, box in placed.items() if box is not None}
        paths = tuple(p for p in character.references if not isinstance(p, MemoryPicture))
        if frames:
            found.append(
                DrawnCharacter(character.name, character.prompt or character.name, frames, boxes, paths)
            )
    return found


def _animals(story: Story) -> list[DrawnCharacter]:
    said = [set(words(frame.caption)) for frame in story.frames]
    cast = {
        name: tuple(i for i, found in enumerate(said) if found & set(options))
        for name, options in SPECIES_WORDS.items()
    }
    return [DrawnCharacter(name, name, frames) for name, frames in cast.items() if frames]
