"""Which stories a batch is of: files, folders and JSONL read, each with a name, and all that cannot be used listed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastory.errors import InputError
from fastory.files import check_names_fit
from fastory.story import STORY_FILES, Story
from fastory.story.files import READERS
from fastory.story.lines import LINES, read_lines
from fastory.story.self_contained import with_pictures_inside
from fastory.wording import counted


@dataclass(frozen=True)
class BatchStory:
    """A story of a batch. name: of its run folder; source: as the user knows it, a file or a line of one."""

    name: str
    story: Story
    source: str


def read_stories(
    names: Sequence[str], examples: Mapping[str, Path], check: Callable[[Story], object]
) -> list[BatchStory]:
    """The stories of files, folders and JSONL, in this order. examples: bundled stories by name.

    check: raises InputError for a story whose settings cannot be used. Raises InputError that names every story which cannot
    be used, a line each.
    """
    check_names_fit([Path(name) for name in names])
    found: dict[str, BatchStory] = {}
    wrong: list[str] = []
    for source, read in _sources(names, examples):
        try:
            story = with_pictures_inside(read())
            check(story)
            name = _name_of(story)
            if name in found:
                raise InputError(f"{source} is the same story as {found[name].source}: give it once.")
            found[name] = BatchStory(name, story, source)
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError(_listed(wrong, len(wrong) + len(found)))
    if not found:
        raise InputError("no story was given; wanted story files, folders of them, or .jsonl files")
    return list(found.values())


def refused(wrong: Mapping[str, str], stories: Mapping[str, BatchStory]) -> InputError:
    """The error for stories that the model cannot draw. wrong: what is the matter, by name."""
    return InputError(
        _listed([f"{stories[name].source}: {said}" for name, said in wrong.items()], len(stories))
    )


def _listed(wrong: Sequence[str], count: int) -> str:
    if count == 1:
        return wrong[0]
    return "\n  ".join(
        [f"{len(wrong)} of {counted(count, 'story')} cannot be drawn, and nothing was:", *wrong]
    )


Read = Callable[[], Story]


def _sources(names: Sequence[str], examples: Mapping[str, Path]) -> Iterator[tuple[str, Read]]:
    """Each story's source and what reads it."""
    for name in names:
        path = Path(name)
        if name in examples and not path.exists():
            yield name, _reader(examples[name])
        elif path.is_dir():
            yield from _of_folder(path)
        elif path.suffix.lower() in LINES:
            yield from _of_lines(path)
        else:
            yield name, _reader(path)


def _reader(path: Path) -> Read:
    return lambda: Story.read(path)


def _of_folder(folder: Path) -> Iterator[tuple[str, Read]]:
    """The story files in a folder, and the story of each folder in it, by name."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield str(folder), _raiser(InputError(f"{folder} cannot be read: {error.strerror}"))
        return
    empty = True
    for entry in (entry for entry in entries if not entry.name.startswith(".")):
        if entry.is_dir():
            inside = next((entry / name for name in STORY_FILES if (entry / name).is_file()), None)
            found = [] if inside is None else [(str(inside), _reader(inside))]
        elif entry.suffix.lower() in LINES:
            found = list(_of_lines(entry))
        else:
            found = [(str(entry), _reader(entry))] if entry.suffix.lower() in READERS else []
        empty = empty and not found
        yield from found
    if empty:
        wanted = ", ".join((*READERS, *LINES))
        yield str(folder), _raiser(InputError(f"{folder} holds no story: wanted files ending in {wanted}."))


def _of_lines(path: Path) -> Iterator[tuple[str, Read]]:
    try:
        for number, story in enumerate(read_lines(path), start=1):
            source = f"{path} (story {number})"
            if isinstance(story, InputError):
                yield source, _raiser(story)
            else:
                yield source, partial(_itself, story)
    except InputError as error:
        yield str(path), _raiser(error)


def _itself(story: Story) -> Story:
    return story


def _raiser(error: InputError) -> Read:
    def read() -> Story:
        raise error

    return read


def _name_of(story: Story) -> str:
    """The slug and what tells the story from others of its title: the same whatever else the batch has."""
    said = [story.digest(), dict(story.settings)]
    return f"{story.slug}-{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]}"
