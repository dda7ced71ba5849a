"""Files of many stories: JSONL, a story a line, each of the shape that a story.json has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastory.documents import parse_json
from fastory.errors import InputError
from fastory.story.files import MAX_BYTES
from fastory.story.schema import Origin
from fastory.story.story import Story, build_story

LINES = (".jsonl", ".ndjson")
WHAT = "a story as JSON in one line"


def read_lines(path: Path) -> Iterator[Story | InputError]:
    """Each line's story, or what is wrong with it, by file and line; empty lines are skipped.

    A story without a title is named by the file and the line. Pictures lie beside the file, or below it. Raises InputError
    for a file that cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path}: wanted a file of stories, but there is none: check the path.")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES + 1), b""), start=1):
                if len(line) > MAX_BYTES:
                    raise InputError(
                        f"{path}:{number}: wanted a story of at most {MAX_BYTES // 1024} KiB, got more: split the story."
                    )
                if line.strip():
                    yield _read_line(path, number, line)
    except OSError as error:
        raise InputError(
            f"{path}: wanted a file of stories, but it cannot be read ({error.strerror}): check its permissions."
        ) from error


def _read_line(path: Path, number: int, line: bytes) -> Story | InputError:
    name = f"{path}:{number}"
    try:
        data = parse_json(line, Path(name), what=WHAT, todo="correct that line")
        if isinstance(data, dict):
            data = {"title": f"{path.stem} {number}", **data}
        return build_story(Origin(name, {}), data, path)
    except InputError as error:
        return error
