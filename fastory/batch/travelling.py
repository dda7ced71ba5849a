"""A run folder that is drawn on another machine: its files travel as they change, and at home it is whole at any moment.

Pictures travel before the manifest that lists them, each with its hash, and are renamed into place: what was drawn before a
worker, its host or the batch was killed is kept, and any worker goes on from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastory import files
from fastory.errors import FastoryError
from fastory.runs import manifest
from fastory.runs.folder import RunFolder

PREFIX = "fastory-batch-"
ABANDONED = (
    60.0  # seconds without a change, after which a folder that nobody holds is what a killed worker left
)


@dataclass(frozen=True)
class File:
    """A whole file of a run folder. name: relative, with forward slashes."""

    name: str
    data: bytes
    sha256: str

    @classmethod
    def of(cls, folder: Path, name: str) -> File:
        """As it is now."""
        data = (folder / name).read_bytes()
        return cls(name, data, hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class FilesChanged:
    """Files of a run folder, in the order they are to be written."""

    files: Sequence[File]


class Sender:
    """On the worker's side: finds what has changed in a folder since the last look."""

    def __init__(self, folder: Path, there: Sequence[File]) -> None:
        """there: what the folder at home has already; it is written here."""
        self._folder = folder
        for file in there:
            files.atomic_write(folder / file.name, file.data)
        self._seen = self._stamps()

    def changed(self) -> FilesChanged:
        """The manifest last, as it lists the others; first where it is new, as a folder is a run's by it alone."""
        now = self._stamps()
        names = sorted(name for name, stamp in now.items() if self._seen.get(name) != stamp)
        is_new = manifest.NAME not in self._seen
        names.sort(key=lambda name: (name == manifest.NAME) != is_new)
        self._seen = now
        return FilesChanged([File.of(self._folder, name) for name in names])

    def _stamps(self) -> dict[str, tuple[int, int, int]]:
        found = {}
        for path in self._folder.rglob("*"):
            if path.is_file() and not path.name.startswith("."):  # a lock, and what is being written
                status = path.stat()
                name = path.relative_to(self._folder).as_posix()
                found[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
        return found


class Receiver:
    """On the batch's side: the run folder, locked."""

    def __init__(self, path: Path) -> None:
        """Raises InputError for a folder that is no run's, FastoryError where another process draws into it."""
        self._folder = RunFolder(path)
        try:
            self._folder.read()
        except BaseException:
            self._folder.close()
            raise

    def files(self) -> list[File]:
        """What the run has so far."""
        if not self._folder.manifest:
            return []
        names = [*manifest.listed_files(self._folder.manifest), manifest.NAME]
        return [File.of(self._folder.path, name) for name in names if (self._folder.path / name).is_file()]

    def take(self, changed: FilesChanged) -> None:
        """Write files. Raises FastoryError for one that is not what was sent, and where the disk fails."""
        for file in changed.files:
            name = PurePosixPath(file.name)
            if name.is_absolute() or ".." in name.parts:
                raise FastoryError(f"a worker sent a file named {file.name!r}, which no run folder has")
            if hashlib.sha256(file.data).hexdigest() != file.sha256:
                raise FastoryError(
                    f"{self._folder.path / file.name} arrived damaged; the same command goes on"
                )
            self._folder.write(file.name, file.data)

    def close(self) -> None:
        """Release the lock."""
        self._folder.close()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder on this machine, removed at the end; those that killed workers left are removed now."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        _remove_abandoned(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = files.lock_folder(folder, "draws in", "free some space", name=files.MARK)
    try:
        yield folder / "run"
    finally:
        files.remove(folder)
        lock.release()


def _remove_abandoned(folder: Path) -> None:
    """Remove a folder that carries our mark, which no process holds."""
    mark = folder / files.MARK
    with contextlib.suppress(OSError, FastoryError):
        status = mark.lstat()
        if time.time() - status.st_mtime > ABANDONED and status.st_uid == os.getuid():
            lock = files.lock_folder(folder, "draws in", "leave it", name=files.MARK)
            files.remove(folder)
            lock.release()
