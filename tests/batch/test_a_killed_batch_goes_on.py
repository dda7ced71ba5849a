"""A batch is killed, its workers die, its disk fills: the same command goes on, to the bytes of `fastory generate`."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from batches import FEW, events_of, files_of, runs_of, start, states, wait_for, write_batch
from ranks import Ended, run_ranks


def run_batch(folder: Path, *arguments: object, prepare: Any = lambda: None) -> Ended:
    """The command in a forked process; its workers are forks, too, as PyTorch is imported there."""

    def forks(rank: int) -> None:
        from fastory.batch import local

        local.START = "fork"
        prepare()

    (ended,) = run_ranks(1, ["batch", *arguments, *FEW, "--json"], folder, forks)
    return ended


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Each of four stories drawn by `fastory generate`, by its name."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {}
    for story in write_batch(folder / "stories", 4):
        (ended,) = run_ranks(1, ["generate", story, "-o", folder / story.stem, *FEW], folder)
        assert ended.status == 0, ended.err
        runs[story.stem] = files_of(folder / story.stem)
    return runs


def test_worker_and_batch_killed_in_the_middle(alone: Any, tmp_path: Path) -> None:
    """Real processes: what ends with whom is what is asked here."""
    write_batch(tmp_path / "stories", 4)
    command = ["batch", tmp_path / "stories", "-o", tmp_path / "out", "--workers=2", *FEW, "--json"]
    process = start(*command)
    wait_for(process, "BatchProgress")
    workers = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    lost = wait_for(process, "WorkerLost")
    assert lost["reason"] == "ended by signal 9"
    done = wait_for(process, "StoryDone")["story"]
    left = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive, "a worker went on after its batch was killed"

    process = start(*command)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    again = {event["story"] for event in events_of(out, "BatchProgress")}
    assert again and done not in again
    assert runs_of(tmp_path / "out") == alone and states(tmp_path / "out") == ["done"] * 4


def test_a_story_that_kills_its_worker_fails_and_the_others_do_not(alone: Any, tmp_path: Path) -> None:
    from fastory.batch.drawer import Drawer

    draw = Drawer.draw

    def prepare() -> None:
        def deadly(self: Any, task: Any) -> Any:
            if task.name.startswith("story-1"):
                os.kill(os.getpid(), signal.SIGKILL)
            return draw(self, task)

        Drawer.draw = deadly  # type: ignore[method-assign]

    write_batch(tmp_path / "stories", 3)
    command = [tmp_path / "stories", "-o", tmp_path / "out"]
    ended = run_batch(tmp_path, *command, prepare=prepare)
    assert ended.status == 1 and "1 story failed" in ended.err and len(ended.err.splitlines()) == 1
    assert len(events_of(ended.out, "WorkerLost")) == 3
    (failure,) = events_of(ended.out, "StoryFailed")
    assert "signal 9, 3 times" in failure["reason"] and (failure["failed"], failure["story"][:7]) == (
        1,
        "story-1",
    )
    assert states(tmp_path / "out") == ["done", "failed", "done"]
    assert run_batch(tmp_path, *command).status == 0  # tried again, and it alone
    assert runs_of(tmp_path / "out") == {name: alone[name] for name in ("story-0", "story-1", "story-2")}


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (errno.ENOSPC, "the disk is full"),
        pytest.param(errno.ESTALE, os.strerror(errno.ESTALE), marks=pytest.mark.slow),
        pytest.param(errno.EROFS, os.strerror(errno.EROFS), marks=pytest.mark.slow),
    ],
    ids=["full", "lost network folder", "read-only"],
)
def test_a_disk_that_fails_ends_the_batch_in_one_line(
    number: int, wanted: str, alone: Any, tmp_path: Path
) -> None:
    from fastory import files

    def prepare() -> None:
        counted = [0]

        def full(operation: str, path: Path) -> None:
            counted[0] += operation == "write" and path.name.startswith(".frame-")
            if counted[0] > 5:
                raise OSError(number, os.strerror(number))

        files.before_operation = full

    write_batch(tmp_path / "stories", 3)
    command = [tmp_path / "stories", "-o", tmp_path / "out"]
    ended = run_batch(tmp_path, *command, prepare=prepare)
    assert ended.status == 1 and wanted in ended.err and len(ended.err.splitlines()) == 1
    assert not events_of(ended.out, "StoryFailed")
    assert states(tmp_path / "out").count("failed") == 0
    assert run_batch(tmp_path, *command).status == 0
    assert runs_of(tmp_path / "out") == {name: alone[name] for name in ("story-0", "story-1", "story-2")}


def test_a_worker_of_another_version_is_refused(tmp_path: Path) -> None:
    """As where a machine of a cluster has an older fastory: its pictures would have other bytes."""
    from fastory.batch import drawer

    opened = drawer.opened

    def prepare() -> None:
        def older(model: Any) -> Any:
            versions = {"fastory": str(os.getpid())}
            return replace(opened(model), versions=versions)

        drawer.opened = older

    write_batch(tmp_path / "stories", 2)
    ended = run_batch(tmp_path, tmp_path / "stories", "-o", tmp_path / "out", "--workers", 2, prepare=prepare)
    assert (
        ended.status == 2 and "wanted the same on all hosts" in ended.err and len(ended.err.splitlines()) == 1
    )


def test_stories_that_are_added_are_drawn_alone(tmp_path: Path) -> None:
    first, second = write_batch(tmp_path / "stories", 2)
    assert run_batch(tmp_path, first, "-o", tmp_path / "out").status == 0
    ended = run_batch(tmp_path, first, second, "-o", tmp_path / "out")
    assert ended.status == 0
    assert {event["story"][:7] for event in events_of(ended.out, "BatchProgress")} == {"story-1"}
    (
        tmp_path / "out" / next(iter_runs(tmp_path / "out")) / "sheet.png"
    ).unlink()  # noticed by its run folder alone
    (first_event,) = events_of(run_batch(tmp_path, first, second, "-o", tmp_path / "out").out, "BatchStarted")
    assert (first_event["done"], first_event["workers"]) == (2, 0)


def iter_runs(batch: Path) -> Any:
    return (path.name for path in sorted(batch.iterdir()) if path.is_dir())
