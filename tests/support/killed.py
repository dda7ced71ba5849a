"""Ends a command at any one of its changes of the disk, as `kill -9` would, runs it again and compares every byte.

Every trial is a forked child of the test's process: torch is imported and models are open already, so a trial costs what
the command itself does. A command must not rely on threads or CUDA that the test's process started before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastory import files

Command = Callable[[Path], object]
Contents = Mapping[str, str]
Operation = tuple[str, str]
"""What is done, as files.before_operation is told, and the path, relative to the trial's folder where it lies there."""


@dataclass(frozen=True)
class Ended:
    """How a child ended. status: its exit status, negative for a signal; operations: the changes of the disk it made."""

    status: int
    operations: Sequence[Operation]
    said: str


def contents(folder: Path, skip: Collection[str] = (".lock",)) -> dict[str, str]:
    """sha256 of every file, "folder" for a folder and where a link leads, by relative path; hidden names are included.

    skip: names of files and folders that may be there or not, with all that is in them.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not set(name.parts) & set(skip):
            found[name.as_posix()] = _state(path)
    return found


def _state(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def check_every_operation(
    place: Path,
    prepare: Command,
    command: Command,
    *,
    most: int | None = None,
    look: Callable[[Path], Contents] = contents,
    after_kill: Callable[[Path], object] = lambda folder: None,
) -> Sequence[Operation]:
    """Kill `command` before each of its changes of the disk, then run it again: it must end as if never interrupted.

    prepare(folder): fills the new, empty folder of a trial; command(folder): the command, of which nothing may depend on
    the folder's name. most: so many of the operations, evenly spread, with the first and the last; None for all. look:
    what is compared, see `contents`. after_kill(folder): checks, in the test's process, what the killed command left.
    Returns the operations of an uninterrupted run. Fails with every operation after which anything differed.
    """
    if not hasattr(os, "fork"):
        pytest.skip("kills forked children, and this system has no fork")
    whole = _fresh(place / "whole", prepare)
    _succeed(run_apart(command, whole))  # caches outside the folder are as any later run finds them
    counted = _fresh(place / "counted", prepare)
    operations = _succeed(run_apart(command, counted)).operations
    assert operations, "the command changed nothing on the disk, or not through fastory.files"
    wanted = look(whole)
    assert look(counted) == wanted, f"two uninterrupted runs differ: {_difference(wanted, look(counted))}"
    shutil.rmtree(counted)
    failed = []
    for number in spread(len(operations), most):
        folder = _fresh(place / f"killed-{number:03d}", prepare)
        if said := _trial(folder, command, number, wanted, look, after_kill):
            failed.append(f"killed before {number}, {' '.join(operations[number])}: {said}")
        shutil.rmtree(folder, ignore_errors=True)
    assert not failed, f"{len(failed)} trials of {len(operations)} operations:\n" + "\n".join(failed)
    return operations


def spread(count: int, most: int | None) -> list[int]:
    """The numbers 0 .. count - 1, or `most` of them, evenly spread from the first to the last."""
    if most is None or count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _trial(
    folder: Path,
    command: Command,
    number: int,
    wanted: Contents,
    look: Callable[[Path], Contents],
    after_kill: Callable[[Path], object],
) -> str:
    """What was wrong, empty where nothing was."""
    ended = run_apart(command, folder, kill_before=number)
    if ended.status != -signal.SIGKILL:
        return f"it was not killed, but ended with {ended.status}: {ended.said}"
    try:
        after_kill(folder)
    except Exception as error:
        return f"what it left: {error!r}"
    again = run_apart(command, folder)
    if again.status:
        return f"the same command then ended with {again.status}: {again.said}"
    found = look(folder)
    return "" if found == wanted else _difference(wanted, found)


def _difference(wanted: Contents, found: Contents) -> str:
    names = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    kinds = [f"{name} ({_kind(name, wanted, found)})" for name in names]
    return f"{len(names)} differ: {', '.join(kinds[:6])}"


def _kind(name: str, wanted: Contents, found: Contents) -> str:
    if name not in found:
        return "missing"
    return "other bytes" if name in wanted else "left over"


def _fresh(folder: Path, prepare: Command) -> Path:
    folder.mkdir(parents=True)
    prepare(folder)
    return folder


def _succeed(ended: Ended) -> Ended:
    assert ended.status == 0, f"the uninterrupted command ended with {ended.status}: {ended.said}"
    return ended


def run_apart(command: Command, folder: Path, kill_before: int | None = None) -> Ended:
    """Run command(folder) in a forked child; with `kill_before` it is killed before its operation of that number."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(command, folder, kill_before, writing)  # does not return
    os.close(writing)
    with open(reading, "rb") as pipe:
        data = pipe.read()  # until the child has ended, or its report would not fit into the pipe
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    operations, said = pickle.loads(data) if data else ([], "")  # noqa: S301  # written by our own child
    return Ended(status, operations, said)


def _run(command: Command, folder: Path, kill_before: int | None, writing: int) -> None:
    """The child's whole life. It leaves by os._exit, so that nothing of the test's process is cleared up twice."""
    operations: list[Operation] = []

    def before_operation(operation: str, path: Path) -> None:
        if len(operations) == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        with contextlib.suppress(ValueError):
            path = path.absolute().relative_to(folder.absolute())
        operations.append((operation, str(path)))

    status, said = 1, ""
    try:
        _one_thread()
        files.before_operation = before_operation
        command(folder)
        status = 0
    except BaseException:
        said = traceback.format_exc()
    with open(writing, "wb") as pipe:
        pickle.dump((operations, said), pipe)
    os._exit(status)


def _one_thread() -> None:
    """OpenMP's threads do not survive a fork: a child that asked for more than one would wait for them for ever."""
    torch.set_num_threads(1)
    torch.set_num_threads = lambda count: None  # type: ignore[assignment]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
