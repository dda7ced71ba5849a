"""What was measured already, kept beside the table that is being made: an interrupted evaluation goes on from it.

A line of JSON a measure and story, under a hash of the pictures, the captions and of what measured them. A line that a kill
left unfinished is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastory import files
from fastory.errors import InputError
from fastory.evaluation.rows import Measured, Source, from_data
from fastory.evaluation.stories import DrawnStory

HEADER = json.dumps({"schema": 1, "what": "fastory evaluation"})


def key_of(story: DrawnStory, measure: str, sources: Sequence[Source]) -> str:
    """Equal for equal pictures, captions and annotations in one measure by the same models: hex sha256."""
    pictures = [files.sha256_of(path) if path.is_file() else None for path in story.pictures]
    cast = [[asdict(c), [files.sha256_of(path) for path in c.references]] for c in story.characters]
    said = [story.title, story.captions, cast, measure, [asdict(source) for source in sources]]
    return hashlib.sha256(json.dumps([pictures, said], default=str).encode()).hexdigest()


class Journal:
    """Kept rows by their key. path: None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        """Reads what is there. Raises InputError for a file that is not ours."""
        self.path, self._kept = path, dict[str, list[Measured]]()
        if path is None or not path.exists():
            return
        first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        if first != HEADER:
            raise InputError(f"{path} is in the way: what is measured is kept there; move it away")
        for line in lines:
            try:
                data = json.loads(line)
            except ValueError:  # the last one, of a killed process
                continue
            self._kept[data["key"]] = [from_data(row) for row in data["rows"]]

    def get(self, key: str) -> list[Measured] | None:
        """The rows, or None where nothing was kept."""
        return self._kept.get(key)

    def keep(self, key: str, rows: Sequence[Measured]) -> None:
        """Add a line, which is on the disk when this returns."""
        self._kept[key] = list(rows)
        if self.path is None:
            return
        line = json.dumps({"key": key, "rows": [row.as_data() for row in rows]}, ensure_ascii=False)
        with files.disk_errors(self.path, "What was measured is kept."):
            files.before_operation("append to", self.path)
            new = not self.path.exists()
            with self.path.open("a", encoding="utf-8") as file:
                # a line break first: what a killed process left half done ends there
                file.write(f"{HEADER}\n{line}\n" if new else f"\n{line}\n")
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """The table is written: nothing is left to go on with."""
        if self.path is not None:
            files.remove(self.path)
