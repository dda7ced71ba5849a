"""Damage to a folder, as a stranger, an accident or a full disk may leave it: one change of one file, by seed.

    copy = linked_copy(folder, tmp_path / "copy")         # hard links: cheap; `damage` never writes through one
    done = damage(copy, random.Random(seed), outside)     # says what it did, for the message of a failing test
    with time_limit(20), like_a_user():                   # no hang; root meets a file of mode 000 as others do
        ...
    assert snapshot(outside) == before                    # nothing beyond the folder was touched

All changes are inside `folder`; `outside` is a folder beside it that links are led to.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

DEEP = 100_000
LONG = 5000


def linked_copy(folder: Path, target: Path) -> Path:
    """A copy whose files are hard links. What changes one must remove it first, as `damage` does."""
    shutil.copytree(folder, target, copy_function=os.link, symlinks=True)
    return target


def outside_of(folder: Path) -> Path:
    """A folder with files of a user's, which links can lead to and nothing may change."""
    (folder / "inner").mkdir(parents=True)
    (folder / "diary.md").write_text("precious\n")
    (folder / "config.json").write_text('{"hidden_size": 8}\n')
    (folder / "inner" / "picture.png").write_bytes(b"\x89PNG not really")
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, time of change and SHA-256 of everything below a folder, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[path.relative_to(folder).as_posix()] = (state.st_mode, state.st_mtime_ns, content)
    return found


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fails the test where the block takes longer. A pipe that is waited for and a long Python loop are both ended."""

    def late(*_: object) -> None:
        pytest.fail(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def like_a_user() -> Iterator[None]:
    """Root without the right to read and write whatever the modes forbid, in this thread; others are as they were."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) != 0:
        pytest.skip("capabilities cannot be read here")
    effective = data[0]
    data[0] = effective & ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    libc.capset(header, data)
    try:
        yield
    finally:
        data[0] = effective
        libc.capset(header, data)


def damage(folder: Path, chance: random.Random, outside: Path, files: Sequence[str] = ()) -> str:
    """One change of one file below `folder`; returns what was done. files: only these, by relative path."""
    names = sorted(files) or sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    name = chance.choice(names)
    path = folder / name
    kinds = list(OF_FILES)
    if path.suffix == ".json":
        kinds += ["field"] * 2 * len(kinds)
    kind = chance.choice(kinds)
    if kind == "field":
        return f"{name}: {damage_json(path, chance)}"
    return f"{name}: {OF_FILES[kind](path, chance, outside, [folder / other for other in names])}"


Damage = Callable[[Path, random.Random, Path, list[Path]], str]


def _rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _missing(path: Path, chance: random.Random, outside: Path, others: list[Path]) -> str:
    path.unlink()
    return "removed"


def _empty(path: Path, chance: random.Random, outside: Path, others: list[Path]) -> str:
    _rewrite(path, b"")
    return "empty"


def _truncated(path: Path, chance: random.Random, outside: Path, others: list[Path]) -> str:
    data = path.read_bytes()
    size = chance.randrange(max(1, len(data)))
    _rewrite(path, data[:size])
    return f"cut to {size} of {len(data)} bytes"


def _zeroed(path: Path, chance: random.Random, outside: Path, others: list[Path]) -> str:
    data = path.read_bytes()
    start = chance.randrange(max(1, len(data)))
    size = min(len(data) - start, chance.choice([1, 8, 512, len(data)]))
    _rewrite(path, data[:start] + bytes(size) + data[start + size :])
    return f"{size} bytes at {start} zeroed"


def _changed(path: Path, chance: random.Random, outside: Path, others: list[Path]) -> str:
    data = bytearray(path.read_bytes() or b"x")
    at, value = chance.randrange(min(len(data), 4096)), chance.randrange(256)
    data[at] = value
    _rewrite(path, bytes(data))
    return f"byte {at} is {value:#x}"


def _longer(path: Path, chance: random.Random, outside: Path, others: list[Path]) -> str:
    _rewrite(path, path.read_bytes() + chance.randbytes(100))
    return "100 bytes longer"


def _swapped(path: Path, chance: random.Random, outside: Path, others: list[Path]) -> str:
    other = chance.choice(others)
    if other != path:
        between = path.with_name(".between")
        path.rename(between)
        other.rename(path)
        between.rename(other)
    return f"swapped with {other.name}"


def _folder(path: Path, chance: random.Random, outside: Path, others: list[Path]) -> str:
    path.unlink()
    path.mkdir()
    if chance.random() < 0.5:
        (path / "mine.txt").write_text("mine\n")
    return "a folder"


def _link(path: Path, chance: random.Random, outside: Path, others: list[Path]) -> str:
    targets = {
        "a file outside": outside / "diary.md",
        "a folder outside": outside,
        "nothing": outside / "nowhere",
        "itself": path,
        "a device": Path("/dev/zero"),
        "the process's memory": Path("/proc/self/mem"),
    }
    said = chance.choice(list(targets))
    path.unlink()
    path.symlink_to(targets[said])
    return f"a link to {said}"


def _pipe(path: Path, chance: random.Random, outside: Path, others: list[Path]) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a pipe"


def _unreadable(path: Path, chance: random.Random, outside: Path, others: list[Path]) -> str:
    data = path.read_bytes()
    _rewrite(path, data)  # the mode belongs to all hard links of a file
    path.chmod(0)
    return "of mode 000"


OF_FILES: dict[str, Damage] = {
    "missing": _missing,
    "empty": _empty,
    "truncated": _truncated,
    "zeroed": _zeroed,
    "changed": _changed,
    "longer": _longer,
    "swapped": _swapped,
    "folder": _folder,
    "link": _link,
    "pipe": _pipe,
    "unreadable": _unreadable,
}

# What takes a field's place, as JSON text: some of it no value of Python's could be dumped to.
VALUES = [
    "null",
    "true",
    "0",
    "-1",
    "1.5",
    "10000000",
    "1000000000000",
    "9" * 400,
    "1e308",
    "1e999",
    "NaN",
    "[]",
    "{}",
    "[[1, 2], 3]",
    '{"a": {"b": 1}}',
    '""',
    '"x"',
    '"../../outside"',
    '"/etc/passwd"',
    '"\\ud800"',
    '"\\u0000"',
    json.dumps("long " * LONG),
    "[" * DEEP + "]" * DEEP,
    '{"a":' * 200 + "1" + "}" * 200,
    "}",
]


def damage_json(path: Path, chance: random.Random) -> str:
    """One field of a JSON file missing, twice, or of another type, size or depth; returns what was done."""
    values = json.loads(path.read_text("utf-8"))
    places = list(_places(values))
    kind = chance.choice(["missing", "twice", *["value"] * 6])
    if not places or chance.random() < 0.05:
        text = chance.choice(VALUES)
        _rewrite(path, text.encode("utf-8", "surrogatepass"))
        return f"the whole is {text[:30]}"
    parents, key = chance.choice(places)
    holder = values
    for parent in parents:
        holder = holder[parent]
    said = ".".join(str(part) for part in (*parents, key))
    if kind == "missing":
        del holder[key]
        _rewrite(path, json.dumps(values).encode())
        return f"{said} is missing"
    mark = "a place that is filled below"
    text = chance.choice(VALUES)
    if kind == "twice" and isinstance(holder, dict):
        text = f"{json.dumps(holder[key])}, {json.dumps(key)}: {text}"
    holder[key] = mark
    _rewrite(path, json.dumps(values).replace(json.dumps(mark), text, 1).encode("utf-8", "surrogatepass"))
    return f"{said} {'twice' if kind == 'twice' else 'is'}: {text[:30]}"


def _places(values: Any, parents: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every field of nested objects and lists, as the keys that lead to its holder and its own."""
    keys = (
        list(values)
        if isinstance(values, dict)
        else list(range(len(values)))
        if isinstance(values, list)
        else []
    )
    for key in keys:
        yield parents, key
        yield from _places(values[key], (*parents, key))
