"""Stories in bulk: a story file, a folder of story files, or a JSONL file with a story a line."""

from __future__ import annotations

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


def read_stories(path: Path) -> list[Story]:
    """The stories of a file, of every story file that lies in a folder (by name), or of every line of a JSONL file.

    Raises InputError, by file and line, for one that cannot be used, and where there is none.
    """
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.suffix.lower() in (*READERS, JSONL) and file.is_file()
        )
        if not files:
            raise InputError(
                f"{path}: wanted a folder with story files ({', '.join((*READERS, JSONL))}), got none"
            )
        return [story for file in files for story in read_stories(file)]
    return _read_lines(path) if path.suffix.lower() == JSONL else [Story.read(path)]


def _read_lines(path: Path) -> list[Story]:
    """A story a line, in the shape of a .json story file; one without a title is called after its line."""
    data = read_bytes(path, what="stories, one a line", most=MOST_BYTES)
    stories: list[Story] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        if len(stories) == MOST_STORIES:
            raise InputError(f"{path}:{number}: wanted at most {MOST_STORIES} stories, got more")
        stories.append(_read_line(line, path, number))
    if not stories:
        raise InputError(f"{path}: wanted stories, one a line, got an empty file")
    return stories


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
