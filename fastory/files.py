"""Writing, hashing, moving, removing and locking of files: the only copies of these in fastory.

Every change of the disk goes through a function here. Each asks `before_operation` first, which does nothing: a fault test
puts a function in its place that ends the process at the n-th operation.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fastory.errors import FastoryError, InputError

LOCK = ".lock"
PARTIAL = ".partial"

Write = Callable[[Path], object]


def _nothing(operation: str, path: Path) -> None:
    """What happens before an operation, outside of fault tests."""


before_operation: Callable[[str, Path], None] = _nothing


def partial_of(target: Path) -> Path:
    """Where `target` is written until it is whole: beside its place, under a hidden name."""
    return target.with_name(f".{target.name}{PARTIAL}")


def atomic_write(target: Path, data: bytes | Write, *, kept: str = "What is finished is kept.") -> str:
    """Write a file beside its place, sync it, rename it, sync the folder. Returns the sha256 (hex) of the file.

    data: the bytes, or a function that writes the file at the path it is given. The folder is made if needed. After a
    crash at any moment `target` is the old file or the whole new one. Raises FastoryError where the disk is full or
    the file cannot be written; `kept` ends that message.
    """
    partial = partial_of(target)
    with disk_errors(target, kept):
        make_folder(target.parent)
        try:
            _fill(partial, data)
            digest = sha256_of(partial)
            sync(partial)
            replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    return digest


def _fill(partial: Path, data: bytes | Write) -> None:
    before_operation("write", partial)
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()  # a link of this name would be written through
    if not isinstance(data, bytes):
        data(partial)
        return
    half = len(data) // 2
    with partial.open("xb") as file:
        file.write(data[:half])
        file.flush()
        before_operation("write the rest of", partial)
        file.write(data[half:])


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder, over a file of the target's name if there is one, and sync the folders it concerns."""
    before_operation("replace", target)
    os.replace(source, target)
    before_operation("sync the folder of", target)
    for folder in {source.parent, target.parent}:
        sync(folder)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    if not path.is_dir():
        before_operation("make", path)
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a link (never what it leads to) or a folder with all in it; nothing where there is none."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        before_operation("remove", path)
        path.unlink(missing_ok=True)
        return
    for entry in sorted(path.iterdir()):
        remove(entry)
    before_operation("remove", path)
    path.rmdir()


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle for a folder; NTFS journals the rename
    before_operation("sync", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Sync every file below `folder`, then the folders, the deepest first."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_link_below(root: Path, path: Path) -> bool:
    """Whether `path`, or a folder between `root` and it, is a symbolic link: what is written there lands elsewhere."""
    between = [path, *path.parents]
    return any(place.is_symlink() for place in between[: between.index(root)])


@contextlib.contextmanager
def locked_folder(path: Path, doing: str, hint: str) -> Iterator[None]:
    """Hold the lock file of a folder, which the system releases when the process ends, however it ends.

    doing: what another process is doing where the lock is held, such as "draws into"; hint: what to do then. The folder
    must exist. Raises FastoryError where another process holds the lock, InputError where nothing can be written.
    """
    lock = lock_folder(path, doing, hint)
    try:
        yield
    finally:
        lock.release()


def lock_folder(path: Path, doing: str, hint: str) -> FileLock:
    """The lock of `locked_folder`, held until its `release` is called."""
    file = path / LOCK
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise InputError(f"{file} is not a lock file of ours; move it away, or {hint}")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FastoryError(f"another process {doing} {path}; wait for it to end, or {hint}") from None
    except OSError as error:
        raise InputError(f"cannot write into {path}: {error.strerror or error}; {hint}") from error
    return lock


@contextlib.contextmanager
def disk_errors(target: Path, kept: str = "What is finished is kept.") -> Iterator[None]:
    """Turn a full disk or a file that cannot be written into a FastoryError that names `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors writes in Rust and says "... (os error 28)" in an error of its own
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error):
            raise FastoryError(
                f"the disk is full: {target} could not be written. Free some space; {_lower(kept)} "
                "The same command goes on."
            ) from error
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise FastoryError(f"{target} could not be written: {said}. {kept}") from error


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def check_names_fit(paths: Sequence[Path]) -> None:
    """InputError for a path that no file system takes: over 255 bytes in a name, over 4095 in all, or with a NUL."""
    for path in paths:
        try:
            path.lstat()
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            shown = str(path)[:60]
            said = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{shown!r}...: wanted a path, got one that cannot be used ({said})") from error
