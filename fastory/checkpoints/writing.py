"""Writing converted weights: beside their place, by one process at a time, with the rights that any new file gets."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fastory.errors import InputError

LOCK = "fastory.lock"


@contextmanager
def place_beside(output: Path) -> Iterator[Path]:
    """An empty folder OUTPUT.unfinished on the same disk, removed at the end; what a killed process left in it goes first.

    The system releases a killed process's lock, so what is locked is being written. Raises InputError for that, and
    for a folder of this name that we did not make; OSError where none can be made.
    """
    place = output.with_name(f"{output.name}.unfinished")
    place.mkdir(exist_ok=True)
    if any(place.iterdir()) and not (place / LOCK).exists():
        raise InputError(
            f"{place} is in the way: {output} is first written there; move it, or give another output"
        )
    lock = FileLock(place / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another process is writing {output}; wait for it to end, or give another output"
        ) from None
    try:
        _clear(place, output)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        lock.release()


def _clear(place: Path, output: Path) -> None:
    """Remove what was left, but for a folder that was moved away from `output` and not yet replaced: it goes back."""
    if (place / "old").exists() and not output.exists():
        (place / "old").rename(output)
    for left in place.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != LOCK:
            left.unlink()


def usual_mode(folder: Path) -> int:
    """The rights of a new file in `folder`, by the umask; safetensors makes its files readable by their owner alone."""
    probe = folder / ".fastory-mode"
    probe.touch()
    try:
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink()
