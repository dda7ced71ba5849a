"""A run folder with any one file damaged: one line, or the bytes of the undamaged run; nothing outside is touched, no hang."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_files import damage, like_a_user, linked_copy, outside_of, snapshot, time_limit
from run_folders import contents

from fastory import Story, StoryModel, generate
from fastory.errors import FastoryError
from fastory.events import FrameDrawn

CASES = 150
# With those of model folders and exports 10,000 in all.
SLOW_CASES = int(os.environ.get("FASTORY_HOSTILE_CASES", "4000"))
CAPTIONS = ["a fox is sleeping in the snow", "a fox is jumping in the forest"]
FOX = Story.from_captions(CAPTIONS, title="Fox")
EDITED = Story.from_captions([CAPTIONS[0], "a fox is reading a book"], title="Fox")
OPTIONS: dict[str, Any] = {"steps": 1, "iterations": 1, "batch_size": 2}
REDRAW: dict[str, Any] = {"frames": [1]}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def draw(story: Story, model: StoryModel, folder: Path, pictures: int = 99, **options: Any) -> None:
    """Draw, and leave the run after so many pictures."""
    events = generate(story, model=model, output=folder, **{**OPTIONS, **options})
    for event in events:
        pictures -= isinstance(event, FrameDrawn)
        if not pictures:
            break
    events.close()  # type: ignore[attr-defined]


class Folders:
    """Run folders in every state, and what the same command makes of each."""

    def __init__(self, model: StoryModel, place: Path) -> None:
        self.model, self.place = model, place
        draw(FOX, model, place / "finished")
        draw(FOX, model, place / "partial", pictures=3)
        for name, pictures in (("redrawing", 1), ("moving", 2)):
            shutil.copytree(place / "finished", place / name)
            draw(EDITED, model, place / name, pictures=pictures, **REDRAW)
        shutil.copytree(place / "finished", place / "redrawn")
        draw(EDITED, model, place / "redrawn", **REDRAW)
        self.wanted = {
            "finished": contents(place / "finished"),
            "partial": contents(place / "finished"),
            "redrawing": contents(place / "redrawn"),
            "moving": contents(place / "redrawn"),
            "redrawn": contents(place / "redrawn"),
        }

    def same_command(self, state: str, folder: Path) -> None:
        """The command that finishes what is in a folder of this state."""
        redrawing = state in ("redrawing", "moving", "redrawn")
        options = REDRAW if state in ("redrawing", "moving") else {}
        draw(EDITED if redrawing else FOX, self.model, folder, **options)

    def overwriting(self, state: str, folder: Path) -> None:
        draw(FOX, self.model, folder, overwrite=True)

    def redrawing(self, state: str, folder: Path) -> None:
        draw(FOX, self.model, folder, frames=[0], redraw_seed=4)


@pytest.fixture(scope="module")
def folders(model: StoryModel, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(model, tmp_path_factory.mktemp("folders"))


def forget_checksum(folder: Path) -> None:
    """A manifest as fastory wrote them before it had a checksum: damage to it must be met by the schema alone."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    path.unlink()
    path.write_text(json.dumps(manifest))


def pictures(found: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in found.items() if name.startswith(("iteration-", "frames/"))}


def trial(folders: Folders, seed: int, place: Path) -> str | None:
    """One damage, one command. Returns what was done where it ends otherwise than it should, or None."""
    chance = random.Random(seed)
    place.mkdir()
    outside = outside_of(place / "outside")
    state = chance.choice(list(folders.wanted))
    folder = linked_copy(folders.place / state, place / "run")
    checked = chance.random() < 0.6
    if not checked:
        forget_checksum(folder)
    files = ["manifest.json"] if chance.random() < 0.5 else []
    done = damage(folder, chance, outside, files)
    before = snapshot(outside)
    commands: dict[str, Callable[[str, Path], None]] = {
        "the same command": folders.same_command,
        "--overwrite": folders.overwriting,
        "--frames 0 --redraw-seed 4": folders.redrawing,
    }
    said = chance.choice(["the same command", *commands])
    what = f"seed {seed}, {state}{'' if checked else ' without checksum'}, {done}, then {said}"
    try:
        error = refusal(lambda: commands[said](state, folder))
        assert snapshot(outside) == before, "something outside was changed"
        if not error and said != "--frames 0 --redraw-seed 4" and checked:
            same_bytes(folders, state, folder, overwritten=said == "--overwrite")
    except (Exception, pytest.fail.Exception) as problem:
        return f"{what}: {problem!r:.1000}"
    return None


def refusal(command: Callable[[], None]) -> str:
    """The line that a command ends in; empty where it is done."""
    try:
        with time_limit(30), like_a_user():
            command()
    except FastoryError as refused:
        error = str(refused)
        assert error and "\n" not in error and len(error) < 2000, error[:300]
        return error
    return ""


def same_bytes(folders: Folders, state: str, folder: Path, overwritten: bool) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    found = contents(folder)
    if overwritten:
        assert pictures(found) == pictures(folders.wanted["finished"])
        return
    # what was replaced long ago, and a story.yaml that still is a story, are left as they are
    for name in [name for name in folders.wanted[state] if name.startswith(("history/", "story.yaml"))]:
        found[name] = folders.wanted[state][name]
    whole = folders.place / ("finished" if state in ("finished", "partial") else "redrawn")
    if without_history(folder) == without_history(
        whole
    ):  # a picture that was gone before a redraw is not kept by it
        found["manifest.json"] = folders.wanted[state]["manifest.json"]
    assert {n: d for n, d in found.items() if n in folders.wanted[state]} == folders.wanted[state]


def without_history(folder: Path) -> dict[str, Any]:
    """What the manifest says of all but replaced pictures; without seconds, and the checksum that covers them."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for records in manifest["pictures"].values():
        for record in records.values():
            del record["seconds"]
    return {name: value for name, value in manifest.items() if name not in ("history", "checksum")}


def run(folders: Folders, seeds: range, place: Path) -> None:
    found = []
    for seed in seeds:
        found.append(trial(folders, seed, place / "case"))
        shutil.rmtree(place / "case")
    assert [problem for problem in found if problem] == []


def test_some_damages(folders: Folders, tmp_path: Path) -> None:
    run(folders, range(CASES), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_damages(part: int, folders: Folders, tmp_path: Path) -> None:
    share = SLOW_CASES // 10
    run(folders, range(1000 + part * share, 1000 + (part + 1) * share), tmp_path)
