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
UNFINISHED = ".unfinished"
MARK = "fastory.lock"  # the lock of a folder NAME.unfinished, which says that the folder is ours
NEW, OLD, READY = "new", "old", "ready"  # what may lie in it, see `unfinished`
BLOCK = 2**20

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
            write(partial, data)
            digest = sha256_of(partial)
            sync(partial)
            replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    return digest


def write(path: Path, data: bytes | Write) -> None:
    """Write a file that does not stand in its place yet, neither synced nor renamed; `sync_tree` syncs its folder.

    data: the bytes, or a function that writes the file at the path it is given.
    """
    before_operation("write", path)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # a link of this name would be written through
    if not isinstance(data, bytes):
        path.touch(exist_ok=False)
        mode = (
            path.stat().st_mode
        )  # as the umask has it; safetensors makes its files readable by their owner alone
        data(path)
        path.chmod(stat.S_IMODE(mode))
        return
    half = len(data) // 2
    with path.open("xb") as file:
        file.write(data[:half])
        file.flush()
        before_operation("write the rest of", path)
        file.write(data[half:])


def write_into(folder: Path, data: Write) -> None:
    """Have a function write files of names of its own into a folder that does not stand in its place yet."""
    before_operation("write into", folder)
    data(folder)


def reserve(path: Path) -> None:
    """Give every byte of a file its place on the disk.

    Where a file with holes is mapped into memory, a full disk ends the process by SIGBUS; here it is an OSError.
    """
    before_operation("reserve", path)
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if not hasattr(os, "posix_fallocate"):  # macOS and Windows: a hole is filled by what it reads as
            for start in range(0, size, BLOCK):
                file.seek(start)
                block = file.read(BLOCK)
                file.seek(start)
                file.write(block)
        elif size:
            os.posix_fallocate(file.fileno(), 0, size)


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


def replace_folder(new: Path, target: Path, aside: Path) -> None:
    """Rename the folder `new` to `target`; an old one goes to `aside` first, from where `unfinished` brings it back.

    After a kill `target` is the old folder, the new one, or, between the two renames, missing with the old one `aside`.
    """
    there = target.exists()
    if there:
        replace(target, aside)
    try:
        replace(new, target)
    except OSError:
        if there and not target.exists():
            replace(aside, target)
        raise


def move_files(source: Path, target: Path, last: str) -> None:
    """Rename every file of the folder `source` into the folder `target`, that of the name `last` at the end."""
    for file in sorted(source.iterdir(), key=lambda file: (file.name == last, file.name)):
        replace(file, target / file.name)


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
    for inside, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(inside, name))
        sync(Path(inside))


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_link_below(root: Path, path: Path) -> bool:
    """Whether `path`, or a folder between `root` and it, is a symbolic link: what is written there lands elsewhere."""
    between = [path, *path.parents]
    return any(parent.is_symlink() for parent in between[: between.index(root)])


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


def lock_folder(
    path: Path, doing: str, hint: str, *, name: str = LOCK, shown: Path | None = None
) -> FileLock:
    """The lock of `locked_folder`, held until its `release` is called.

    name: of the lock file; shown: what the messages name in place of `path`.
    """
    file = path / name
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise InputError(f"{file} is not a lock file of ours; move it away, or {hint}")
    lock = FileLock(file)
    before_operation("lock", file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FastoryError(
            f"another process {doing} {shown or path}; wait for it to end, or {hint}"
        ) from None
    except OSError as error:
        raise _refused(f"cannot write into {path}", error, hint) from error
    return lock


def check_unlocked(path: Path, doing: str, hint: str, *, name: str = LOCK, shown: Path | None = None) -> None:
    """FastoryError where another process holds the lock of a folder just now; changes nothing, and holds nothing after.

    name, shown: as `lock_folder` has them.
    """
    file = path / name
    if file.is_file() and not file.is_symlink():
        lock_folder(path, doing, hint, name=name, shown=shown).release()


def check_nobody_makes(target: Path, doing: str, hint: str) -> None:
    """FastoryError where another process is in `unfinished` of this target just now; as `check_unlocked`."""
    check_unlocked(working_folder(target, hint), doing, hint, name=MARK, shown=target)


@contextlib.contextmanager
def unfinished(target: Path, doing: str, hint: str, last: str = "") -> Iterator[Path]:
    """A locked, empty folder TARGET.unfinished on the same disk as `target`, removed at the end.

    Its lock file, the first thing made in it and the last one removed, says that the folder is ours. What a killed
    process left is put in order first: `old`, which `replace_folder` moved aside, goes back where `target` is missing, and
    the files of `ready`, which was whole, go on into `target`, `last` at the end; all else is removed.
    doing, hint: as `locked_folder` has them. Raises FastoryError where another process holds the lock, InputError for a
    folder of this name with other files, and where none can be made.
    """
    working = working_folder(target, hint)
    try:
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        _refuse_other_files(working, target, hint)
        make_folder(working)
    except OSError as error:
        raise _refused(f"{target} cannot be written", error, hint) from error
    lock = lock_folder(working, doing, hint, name=MARK, shown=target)
    try:
        _put_in_order(working, target, last)
        yield working
    finally:
        with contextlib.suppress(
            OSError
        ):  # what cannot be put in order now keeps its mark, and the next one does it
            _put_in_order(working, target, last)
            remove(working / MARK)
        lock.release()
        with contextlib.suppress(OSError):  # what is there is still ours, or locked anew by another process
            remove_empty(working)


def finish_interrupted(target: Path, doing: str, hint: str, last: str = "") -> None:
    """Put in order what a killed process left beside `target`, where there is anything; see `unfinished`."""
    if working_folder(target, hint).exists():
        with unfinished(target, doing, hint, last):
            pass


def working_folder(target: Path, hint: str) -> Path:
    """The folder of `unfinished`. Raises InputError for a target without a name of its own: / or one that ends in `..`."""
    named = target if target.name else target.absolute()
    if named.name in ("", ".."):
        raise InputError(f"{target} has no name of its own; {hint}")
    return named.with_name(named.name + UNFINISHED)


def _refuse_other_files(working: Path, target: Path, hint: str) -> None:
    names = {entry.name for entry in working.iterdir()} if working.is_dir() else set()
    ours = {MARK, NEW, OLD, READY, target.name}
    if (
        working.is_symlink()
        or (working.exists() and not working.is_dir())
        or (names and not {MARK} <= names <= ours)
    ):
        raise InputError(f"{working} is in the way: {target} is first written there; move it away, or {hint}")


def _put_in_order(working: Path, target: Path, last: str) -> None:
    if (working / OLD).exists() and not target.exists():
        replace(working / OLD, target)
    if (working / READY).is_dir() and target.is_dir():
        move_files(working / READY, target, last)
    _clear(working)


def _clear(working: Path) -> None:
    for entry in sorted(working.iterdir()):
        if entry.name != MARK:
            remove(entry)


def remove_empty(folder: Path) -> None:
    """Remove a folder that holds nothing. Raises OSError where it does."""
    before_operation("remove", folder)
    folder.rmdir()


@contextlib.contextmanager
def disk_errors(target: Path, kept: str = "What is finished is kept.") -> Iterator[None]:
    """Turn a full disk or a file that cannot be written into a FastoryError that names `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise FastoryError(
                f"the disk is full: {target} could not be written. Free some space; {_lower(kept)} "
                "The same command goes on."
            ) from error
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise FastoryError(f"{target} could not be written: {said}. {kept}") from error


def _is_full(error: Exception) -> bool:
    """safetensors writes in Rust and says "... (os error 28)" in an error of its own, which is no OSError."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(f"os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def _refused(what: str, error: OSError, hint: str) -> FastoryError:
    """The error for a folder in which not even a first file can be made: only a full disk is not the user's choice."""
    kind = FastoryError if _is_full(error) else InputError
    return kind(f"{what}: {error.strerror or error}; {hint}")


def cache_folder() -> Path:
    """Where fastory keeps what only costs time to make again, beside the caches of torch and of the hub's client."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastory"


def folder_for(path: Path, hint: str) -> None:
    """`make_folder`, of which the user is told what to do. Raises InputError, or FastoryError where the disk is full."""
    try:
        make_folder(path)
    except OSError as error:
        raise _refused(f"cannot write into {path}", error, hint) from error


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
