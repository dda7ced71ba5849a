"""Stories to learn from: a folder of story folders, each a story file and the picture of every frame.

STORIES/
  <any name>/story.yaml                            or story.yml, story.json, story.txt: captions as fastory reads them
             frame-000.png, frame-001.png ..       or frames/frame-000.png .., as in a run folder of `fastory generate`
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastory.errors import InputError
from fastory.story import STORY_FILES, Story


@dataclass(frozen=True)
class Example:
    """One story with its pictures. prompts: the captions as the text encoder gets them. digest: of both, sha256."""

    name: str
    prompts: tuple[str, ...]
    pictures: tuple[Path, ...]
    digest: str


def read_examples(folder: Path, size: tuple[int, int]) -> list[Example]:
    """Every story below `folder`, in the order of their names. size: (width, height) that will be trained.

    Raises InputError for a folder without stories, a story without one of its pictures, a picture that cannot be read
    or is smaller than `size`, and a story of a single frame, which has no history.
    """
    check_is_folder(folder)
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    single = any((folder / name).is_file() for name in STORY_FILES)
    if single or not inside:
        raise InputError(
            f"{folder}: wanted a folder with a folder for every story ({STORY_FILES[0]} and frame-000.png ..), "
            f"got {'a single story' if single else 'none'}; put each story into a folder of its own"
        )
    return [read_example(story, size) for story in inside]


def check_is_folder(folder: Path) -> None:
    """InputError where no folder is at the path of the stories."""
    if not folder.is_dir():
        raise InputError(f"{folder}: wanted a folder of story folders, and there is none; check the path")


def read_example(folder: Path, size: tuple[int, int]) -> Example:
    """The story of one folder. Raises InputError as `read_examples` does."""
    file = next((folder / name for name in STORY_FILES if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder}: wanted a story file ({', '.join(STORY_FILES)}), got none")
    story = Story.read(file)
    count = len(story.frames)
    if count < 2:
        raise InputError(
            f"{file}: wanted a story of two frames or more, got {count}: one frame has no history"
        )
    prompts = tuple(story.prompt(i) for i in range(count))
    pictures = _pictures(folder, count)
    contents = [_checked(path, size) for path in pictures]
    digest = hashlib.sha256(json.dumps([prompts, contents]).encode()).hexdigest()
    return Example(folder.name, prompts, pictures, digest)


def digest_of(examples: Sequence[Example]) -> str:
    """Hex sha256 of captions and pictures, in their order."""
    return hashlib.sha256("".join(example.digest for example in examples).encode()).hexdigest()


def _pictures(folder: Path, count: int) -> tuple[Path, ...]:
    """frame-000.png .. of a story with `count` captions."""
    inside = folder / "frames" if (folder / "frames").is_dir() else folder
    paths = tuple(inside / f"frame-{i:03d}.png" for i in range(count))
    for i, path in enumerate(paths):
        if not path.is_file():
            raise InputError(
                f"{folder}: {count} captions, and no picture {path.name} for frame {i}; wanted {path}"
            )
    if extra := sorted(set(inside.glob("frame-*.png")) - set(paths)):
        raise InputError(
            f"{folder}: {count} captions, and a picture {extra[0].name}; wanted one picture a caption"
        )
    return paths


def _checked(path: Path, size: tuple[int, int]) -> str:
    """sha256 of a picture's file, once its form, checksums and size are good."""
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.verify()
            width, height = image.size
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"{path}: wanted a PNG picture, and it cannot be read ({error})") from error
    if width < size[0] or height < size[1]:
        raise InputError(
            f"{path} has {width} x {height} pixels, and {size[0]} x {size[1]} are trained; "
            "give larger pictures, or a smaller --width and --height"
        )
    return hashlib.sha256(data).hexdigest()
