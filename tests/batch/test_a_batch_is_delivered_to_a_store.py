"""Risk: with --output as a URL a story is half there, is drawn again on another machine, or is lost with the network.

The store is fsspec's own for disks under another name, so that it outlives a command, and its memory.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from batches import FEW, events_of, files_of, states, write_batch
from fsspec.implementations.local import LocalFileSystem
from ranks import Ended, run_ranks

from fastory.batch.store import Store


class Disk(LocalFileSystem):
    """A store on this disk. before: called with every path that is written."""

    protocol = "disk"
    before: Callable[[str], object] = staticmethod(lambda path: None)

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        Disk.before(path)
        super().pipe_file(path, value, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.removeprefix("disk://") if isinstance(path, str) else path)


def run_batch(folder: Path, *arguments: object, before: Callable[[str], object] = lambda path: None) -> Ended:
    """The command in a forked process, as of a machine with the cache CACHE."""

    def prepare(rank: int) -> None:
        from fastory.batch import local

        local.START = "fork"
        fsspec.register_implementation("disk", Disk)
        Disk.before = staticmethod(before)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")

    output = ["-o", f"disk://{folder}/store"]
    (ended,) = run_ranks(1, ["batch", *arguments, *output, *FEW, "--json"], folder, prepare)
    return ended


def left_here(folder: Path) -> list[str]:
    """Files that the command keeps of a batch."""
    found = (folder / "cache" / "fastory" / "batches").rglob("*")
    return sorted(path.name for path in found if path.is_file() and path.name != ".lock")


def test_a_store_gets_whole_stories_and_any_machine_goes_on(tmp_path: Path) -> None:
    first, second = write_batch(tmp_path / "stories", 2)
    written: list[str] = []
    log = tmp_path / "written"

    def before(path: str) -> None:
        with log.open("a") as file:
            file.write(f"{path}\n")

    ended = run_batch(tmp_path, first, before=before)
    assert ended.status == 0, ended.err
    (done,) = events_of(ended.out, "StoryDone")
    assert done["folder"] == f"disk://{tmp_path}/store/{done['story']}"
    written = [path.removeprefix(f"{tmp_path}/store/") for path in log.read_text().splitlines()]
    of_story = [path for path in written if path.startswith(done["story"])]
    assert of_story[-1] == f"{done['story']}/manifest.json" and len(set(of_story)) == len(of_story)
    assert written[0] == written[-1] == "batch.json"  # nothing is drawn before the store takes something
    assert left_here(tmp_path) == ["batch.json"]
    (alone,) = run_ranks(1, ["generate", first, "-o", tmp_path / "alone", *FEW], tmp_path)
    assert alone.status == 0 and files_of(tmp_path / "store" / done["story"]) == files_of(tmp_path / "alone")

    shutil.rmtree(tmp_path / "cache")  # another machine
    ended = run_batch(tmp_path, first, second)
    assert ended.status == 0, ended.err
    assert [event["story"][:7] for event in events_of(ended.out, "StoryDone")] == ["story-1"]
    assert states(tmp_path / "store") == ["done"] * 2
    (tmp_path / "store" / done["story"] / "manifest.json").unlink()  # noticed there
    (began,) = events_of(run_batch(tmp_path, first, second).out, "BatchStarted")
    assert began["done"] == 1


def test_a_store_that_goes_away_costs_nothing_that_was_drawn(tmp_path: Path) -> None:
    write_batch(tmp_path / "stories", 2)

    def lost(path: str) -> None:
        if path.endswith("sheet.png"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    ended = run_batch(tmp_path, tmp_path / "stories", before=lost)
    assert ended.status == 1 and len(ended.err.splitlines()) == 1, ended.err
    assert "could not be written" in ended.err and "the same command goes on" in ended.err
    assert not list((tmp_path / "store").rglob("manifest.json"))
    assert not events_of(ended.out, "StoryFailed")
    drawn = events_of(ended.out, "BatchProgress")[-1]["story"]

    ended = run_batch(tmp_path, tmp_path / "stories")
    assert ended.status == 0, ended.err
    again = [event for event in events_of(ended.out, "BatchProgress") if event["story"] == drawn]
    assert [event["finished"] for event in again] == [4]  # all its pictures were there
    assert states(tmp_path / "store") == ["done"] * 2


def test_a_store_that_cannot_be_a_batch_is_one_line(tmp_path: Path) -> None:
    (story,) = write_batch(tmp_path / "stories", 1)

    def refused(path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    ended = run_batch(tmp_path, story, before=refused)
    assert ended.status == 2 and "cannot be written" in ended.err and len(ended.err.splitlines()) == 1
    (tmp_path / "store").mkdir(exist_ok=True)
    (tmp_path / "store" / "mine.txt").write_text("mine\n")
    ended = run_batch(tmp_path, story)
    assert ended.status == 2 and "holds 'mine.txt'" in ended.err and len(ended.err.splitlines()) == 1
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["mine.txt"]


def test_memory_as_a_store(tmp_path: Path) -> None:
    """Another of fsspec's stores, with paths of its own."""
    store = Store("memory://bucket/batch")
    assert store.read("batch.json") is None and store.first_name() is None
    assert store.manifests([]) == {}
    store.write({"batch.json": b"{}", "story/manifest.json": b"1"}, tmp_path)
    assert store.read("batch.json") == b"{}" and store.first_name() in ("batch.json", "story")
    assert list(store.manifests(["story", "other"])) == ["story"]
    assert list(store.manifests(["story"])) == ["story"]


@pytest.fixture(autouse=True)
def fresh_memory() -> Any:
    yield
    fsspec.filesystem("memory").store.clear()
