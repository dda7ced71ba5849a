"""Stories in bulk: a story file, a folder of story files, or a JSONL file with a story a line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fastory.documents import read_bytes
from fastory.errors import InputError
from fastory.story.files import MAX_BYTES, READERS
from fastory.story.schema import Origin
from fastory.story.story import Story, build_story

JSONL = ".jsonl"
MOST_STORIES = 10_000
MOST_BYTES = 2**26  # of a JSONL file


Read = Story | InputError
"""A story, or what is wrong with it."""


def read_stories(path: Path) -> list[Story]:
    """The stories of a file, of every story file that lies in a folder (by name), or of every line of a JSONL file.

    Raises InputError, by file and line, for one that cannot be used, and where there is none.
    """
    stories = []
    for _, read in each_story(path):
        if isinstance(read, InputError):
            raise read
        stories.append(read)
    return stories


def each_story(path: Path) -> Iterator[tuple[str, Read]]:
    """Those stories one by one, each with the file, or the line of one, that it stands in.

    What is wrong with a story does not keep the others from being read.
    """
    try:
        if path.is_dir():
            for file in _story_files(path):
                yield from each_story(file)
        elif path.suffix.lower() == JSONL:
            yield from _read_lines(path)
        else:
            yield str(path), Story.read(path)
    except InputError as error:
        yield str(path), error


def _story_files(folder: Path) -> list[Path]:
    files = sorted(
        file for file in folder.iterdir() if file.suffix.lower() in (*READERS, JSONL) and file.is_file()
    )
    if not files:
        raise InputError(
            f"{folder}: wanted a folder with story files ({', '.join((*READERS, JSONL))}), got none"
        )
    return files


def _read_lines(path: Path) -> Iterator[tuple[str, Read]]:
    """A story a line, in the shape of a .json story file; one without a title is called after its line."""
    data = read_bytes(path, what="stories, one a line", most=MOST_BYTES)
    count = 0
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        if count == MOST_STORIES:
            raise InputError(f"{path}:{number}: wanted at most {MOST_STORIES} stories, got more")
        count += 1
        try:
            yield f"{path}:{number}", _read_line(line, path, number)
        except InputError as error:
            yield f"{path}:{number}", error
    if not count:
        raise InputError(f"{path}: wanted stories, one a line, got an empty file")


def _read_line(line: bytes, path: Path, number: int) -> Story:
    name = f"{path}:{number}"
    if len(line) > MAX_BYTES:
        raise InputError(f"{name}: wanted a story of at most {MAX_BYTES // 1024} KiB, got more")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name}: wanted text in UTF-8; save the file as UTF-8") from None
    values, lines = READERS[".json"](text, name)
    story = build_story(Origin(name, lines), values, path)
    titled = isinstance(values, dict) and values.get("title")
    return story if titled else replace(story, title=f"{story.title}-{number}")
