"""Processes that take part in a run as torchrun's do, forked from the test's: torch is imported already.

What torchrun itself adds, that it ends all processes when one has died, is left to the tests that start it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from run_folders import contents

# Frames that can be dealt: with references from the latest round one process draws them all.
FEW = [
    "--steps=2",
    "--iterations=1",
    "--references-from=last",
    "--batch-size=2",
    "--noise=per-frame",
    "--json",
]
LIMIT = 240.0  # seconds for all processes of a run, a machine that does other work included

Prepare = Callable[[int], object]
"""Called in every child with its rank, before the command: where a test lets something happen."""


@dataclass(frozen=True)
class Ended:
    """How a process ended. status: its exit code, negative for a signal."""

    status: int
    out: str
    err: str


def run_ranks(
    size: int, arguments: Sequence[object], folder: Path, prepare: Prepare = lambda rank: None
) -> list[Ended]:
    """Run a command of fastory in `size` processes that belong together; one alone gets no word of torchrun's.

    folder: of the test's, for what the processes print.
    """
    if not hasattr(os, "fork"):
        pytest.skip("forks processes, and this system has no fork")
    _import_all()
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _run(rank, size, port, [str(argument) for argument in arguments], folder, prepare)
        children.append(child)
    statuses = _wait(children)
    printed = [[_printed(folder, rank, stream) for stream in ("out", "err")] for rank in range(size)]
    return [Ended(status, out, err) for status, (out, err) in zip(statuses, printed, strict=True)]


@cache
def _import_all() -> None:
    """What a command imports when it opens a model, once and not in every child."""
    from fastory import StoryModel

    StoryModel.open("builtin", device="cpu", dtype="float32")


def run_alone_and_in_two(
    captions: Sequence[str], options: Sequence[str], folder: Path
) -> list[tuple[Ended, dict[str, str]]]:
    """A story drawn by one process, and by two: how rank 0 ended, and sha256 of what the run folder holds but the manifest.

    All of them have to end well.
    """
    (folder / "story.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    found = []
    for size in (1, 2):
        run = folder / f"run-{size}"
        ended = run_ranks(size, ["generate", folder / "story.txt", "-o", run, *options], folder)
        assert [e.status for e in ended] == [0] * size, ended
        files = {name: value for name, value in contents(run).items() if name != "manifest.json"}
        found.append((ended[0], files))
    return found


def _printed(folder: Path, rank: int, stream: str) -> str:
    return (folder / f"rank-{rank}.{stream}").read_text(encoding="utf-8")


def _wait(children: Sequence[int]) -> list[int]:
    """Exit codes; a process that has not ended in time is killed, and fails the test."""
    statuses: dict[int, int] = {}
    until = time.monotonic() + LIMIT
    while len(statuses) < len(children) and time.monotonic() < until:
        for child in children:
            if child not in statuses and (ended := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.01)
    hanging = [child for child in children if child not in statuses]
    for child in hanging:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not hanging, f"{len(hanging)} of {len(children)} processes had not ended after {LIMIT:g} s"
    return [statuses[child] for child in children]


def _run(rank: int, size: int, port: int, arguments: list[str], folder: Path, prepare: Prepare) -> None:
    """A child's whole life. It leaves by os._exit, so that nothing of the test's process is cleared up twice."""
    status = 1
    try:
        for number, stream in ((1, "out"), (2, "err")):
            file = os.open(folder / f"rank-{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        # OpenMP's threads do not survive a fork: a child that asked for more than one would wait for them for ever.
        torch.set_num_threads(1)
        torch.set_num_threads = lambda count: None  # type: ignore[assignment]
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        if size > 1:
            told = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ |= {name: str(value) for name, value in told.items()}
        from fastory.cli import app, reporting

        reporting.stderr.file = sys.stderr
        prepare(rank)
        app(arguments)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
