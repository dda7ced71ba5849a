"""Risk: a picture is announced before it is kept, pictures change their order, or one that is not written costs others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import contents

from fastory import Story, StoryModel, generate
from fastory.errors import FastoryError
from fastory.events import FrameDrawn
from fastory.runs import recording
from fastory.runs.folder import RunFolder
from fastory.runs.recording import Recorder

STORY = Story.from_captions(["a fox", "a cat", "a bear on the beach", "a rabbit"], title="Four")
FRAMES, ROUNDS, AT_ONCE = 4, 2, 2


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def draw(model: StoryModel, folder: Path) -> list[tuple[int, int]]:
    """Draws the story; returns its pictures in the order of their events, each of which is on the disk by then."""
    drawn = []
    for event in generate(
        STORY, model=model, output=folder, steps=2, iterations=ROUNDS - 1, batch_size=AT_ONCE
    ):
        if isinstance(event, FrameDrawn):
            recorded = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["pictures"]
            assert str(event.frame) in recorded[str(event.round)] and event.path and event.path.exists()
            drawn.append((event.round, event.frame))
    return drawn


@pytest.fixture(scope="module")
def whole(model: StoryModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    draw(model, folder)
    return folder


@pytest.mark.parametrize("waits", [True, False], ids=["as on the CPU", "as on a GPU"])
def test_a_micro_batch_writes_its_manifest_once(
    model: StoryModel, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    written, create, save = [], Recorder.__init__, RunFolder.record

    def made(self: Recorder, *arguments: Any) -> None:
        create(self, *arguments)
        self._waits = waits

    monkeypatch.setattr(Recorder, "__init__", made)
    monkeypatch.setattr(RunFolder, "record", lambda self, pictures: (written.append(1), save(self, pictures)))
    assert draw(model, tmp_path / "run") == [(k, i) for k in range(ROUNDS) for i in range(FRAMES)]
    # The first picture is recorded as soon as it is there.
    assert len(written) == ROUNDS * FRAMES // AT_ONCE + 1
    assert contents(tmp_path / "run") == contents(whole)


def test_a_picture_that_cannot_be_written_costs_no_other(
    model: StoryModel, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "run", recording.write_png

    def full(folder: RunFolder, name: str, *rest: Any) -> str:
        if name == "iteration-00/frame-002.png":
            raise FastoryError("the disk is full")
        return write(folder, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "write_png", full)
        with pytest.raises(FastoryError, match="the disk is full"):
            draw(model, folder)
    recorded = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["pictures"]
    assert list(recorded["0"]) == ["0", "1", "3"]
    assert draw(model, folder) == [(0, 2), *((1, i) for i in range(FRAMES))]
    assert contents(folder) == contents(whole)


def test_what_is_drawn_is_kept_when_the_reader_leaves(model: StoryModel, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    events = generate(STORY, model=model, output=folder, steps=1, iterations=0, batch_size=4)
    for event in events:
        if isinstance(event, FrameDrawn):  # the first one; the others may be on their way
            break
    events.close()  # type: ignore[attr-defined]
    recorded = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["pictures"]
    assert "0" in recorded["0"]
