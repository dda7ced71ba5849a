"""Risk: appending frames draws the others again, draws the new ones without them, or leaves half a story after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed import check_every_operation
from PIL import Image
from run_folders import CAPTIONS, contents, drawn, edit_manifest
from run_folders import draw as draw_two_at_once

from fastory import Frame, InputError, Story, StoryModel, generate
from fastory.events import Event, FrameDrawn
from fastory.modes.iterative import iterative
from fastory.modes.mode import StoryPlan
from fastory.pictures import open_picture
from fastory.runs.manifest import read_manifest, settings_of
from fastory.runs.take_back import take_back

SHORT = Story.from_captions(CAPTIONS[:2], title="Fox")
LONG = Story.from_captions(CAPTIONS, title="Fox")
FEW: dict[str, Any] = {"steps": 1, "iterations": 1, "references_from": "last"}


def draw(story: Story, model: StoryModel, folder: Path, **options: Any) -> list[Event]:
    return draw_two_at_once(story, model, folder, **FEW, **options)


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


@pytest.fixture(scope="module")
def short(model: StoryModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    draw(SHORT, model, folder)
    return folder


@pytest.fixture
def run(short: Path, tmp_path: Path) -> Path:
    shutil.copytree(short, tmp_path / "run")
    return tmp_path / "run"


class There:
    """A run's pictures, as a mode asks for them."""

    def __init__(self, folder: Path, frames: int) -> None:
        self.folder, self.frames = folder, frames

    def has(self, round: int, frame: int) -> bool:
        return frame < self.frames

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        return open_picture(self.folder / f"iteration-{round:02d}" / f"frame-{frame:03d}.png"), None


def test_new_frames_see_the_old_ones_which_stay(run: Path, short: Path, model: StoryModel) -> None:
    """The oracle is the mode, given the short run's pictures as finished ones."""
    before = contents(run)
    assert drawn(draw(LONG, model, run, frames=[2])) == {(k, 2) for k in range(2)}
    after = contents(run)
    changed = {"manifest.json", "story.yaml", "sheet.png", "storybook.html"}
    assert {name for name in before if before[name] != after[name]} == changed
    added = {"frames/frame-002.png", *(f"iteration-0{k}/frame-002.png" for k in range(2))}
    assert set(after) - set(before) == added
    assert Story.read(run / "story.yaml").frames == LONG.frames
    plan = StoryPlan(LONG, settings_of(read_manifest(run / "manifest.json")), finished=There(short, 2))
    seen = [event for event in iterative(model, plan, batch_sizes=[2]) if isinstance(event, FrameDrawn)]
    for event in seen:
        there = np.asarray(open_picture(run / f"iteration-{event.round:02d}" / "frame-002.png"))
        assert (there == np.asarray(event.image)).all()
    assert len(seen) == 2
    assert not drawn(draw(LONG, model, run)), "the folder belongs to the longer story now"


def test_appending_is_asked_for_and_nothing_else_may_differ(run: Path, model: StoryModel) -> None:
    before = contents(run)
    with pytest.raises(InputError, match=r"frame 2 here is not there.*against the rest: --frames 2"):
        draw(LONG, model, run)
    for title, captions in (("Cat", CAPTIONS), ("Fox", [CAPTIONS[2], *CAPTIONS[1:]]), ("Fox", CAPTIONS[:1])):
        with pytest.raises(InputError, match="holds another run"):
            draw(Story.from_captions(captions, title=title), model, run, frames=[len(captions) - 1])
    with pytest.raises(InputError, match="wanted 0 to 2, got 3"):
        draw(LONG, model, run, frames=[2, 3])
    assert contents(run) == before


def test_a_file_of_the_users_is_not_written_over(run: Path, model: StoryModel) -> None:
    (run / "frames" / "frame-002.png").write_bytes(b"a diary")
    before = contents(run)
    with pytest.raises(InputError, match=r"frame-002\.png is in the way"):
        draw(LONG, model, run, frames=[2])
    assert contents(run) == before


def test_an_append_that_is_not_finished_goes_on_or_is_given_up(
    run: Path, model: StoryModel, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "whole")
    draw(LONG, model, tmp_path / "whole", frames=[2])
    before = contents(run)
    for end in ("given up", "gone on with"):
        events = generate(LONG, model=model, output=run, batch_size=2, frames=[2], **FEW)
        next(event for event in events if isinstance(event, FrameDrawn))
        events.close()  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="unfinished redraw of frames 2; finish it with --frames 2"):
            draw(LONG, model, run)
        if end == "given up":
            assert not drawn(draw(SHORT, model, run))
            assert contents(run) == before
    assert drawn(draw(LONG, model, run, frames=[2])) == {(1, 2)}
    assert contents(run) == contents(tmp_path / "whole")


def test_what_was_drawn_beside_fewer_frames_is_never_drawn_otherwise(run: Path, model: StoryModel) -> None:
    """Frame 0 of a later round did not see frame 2; drawn again it would. Round 0 sees no other frame."""
    draw(LONG, model, run, frames=[2])
    (run / "iteration-01" / "frame-000.png").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be drawn again as it was"):
        draw(LONG, model, run)
    draw(LONG, model, run, frames=[0], redraw_seed=5)
    kept = run / "history" / "002" / "iteration-00" / "frame-000.png"
    assert kept.exists(), "an append has a number in the history, too"
    (run / "iteration-00" / "frame-001.png").unlink()
    assert drawn(draw(LONG, model, run)) == {(0, 1)}


def test_a_causal_story_goes_on_from_its_last_frame(model: StoryModel, tmp_path: Path) -> None:
    """A frame depends on earlier ones alone, so the longer story drawn at once has the same bytes."""
    options = {"mode": "causal", "steps": 1}
    for story, folder, more in ((SHORT, "run", {}), (LONG, "run", {"frames": [2]}), (LONG, "once", {})):
        list(generate(story, model=model, output=tmp_path / folder, **options, **more))
    names = [name for name in contents(tmp_path / "once") if name != "manifest.json"]
    assert all(contents(tmp_path / "run")[name] == contents(tmp_path / "once")[name] for name in names)


def test_a_manifest_with_fewer_frames_after_a_redraw_is_damaged(run: Path, model: StoryModel) -> None:
    """Of frame 0, so that all other numbers in the manifest are those of frames that it has."""
    redraw: dict[str, Any] = {"frames": [0], "redraw_seed": 4}
    events = generate(SHORT, model=model, output=run, batch_size=2, **FEW, **redraw)
    next(event for event in events if isinstance(event, FrameDrawn))
    events.close()  # type: ignore[attr-defined]

    def cut(manifest: dict[str, Any]) -> None:
        manifest["redraw"]["story"]["frames"] = manifest["redraw"]["story"]["frames"][:1]

    edit_manifest(run, cut)
    with pytest.raises(InputError, match="it records fewer frames after a redraw"):
        draw(SHORT, model, run, **redraw)


@pytest.mark.parametrize("most", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_killed_at_any_operation(short: Path, model: StoryModel, tmp_path: Path, most: int | None) -> None:
    def command(folder: Path) -> None:
        draw(LONG, model, folder / "run", frames=[2])

    check_every_operation(
        tmp_path, lambda folder: shutil.copytree(short, folder / "run"), command, most=most, look=contents
    )


def but_history(folder: Path) -> dict[str, str]:
    """All files but the manifest, which says that there was an append, and the history."""
    return {
        name: digest
        for name, digest in contents(folder).items()
        if not name.startswith("history/") and name != "manifest.json"
    }


def test_an_append_taken_back_leaves_the_story_as_it_was_and_can_be_had_again(
    run: Path, short: Path, model: StoryModel
) -> None:
    """Nothing is drawn for either, and a file beside those that a manifest lists stays."""
    draw(LONG, model, run, frames=[2])
    long = but_history(run)
    (run / "frames" / "mine.png").write_bytes(b"a diary")
    assert take_back(run, "001", {}, {})
    (run / "frames" / "mine.png").rename(run.parent / "mine.png")
    assert not drawn(draw(Story.read(run / "story.yaml"), model, run))
    assert but_history(run) == but_history(short)
    kept = {name[12:]: digest for name, digest in contents(run).items() if name.startswith("history/002/")}
    assert kept == {name: digest for name, digest in long.items() if name in kept} and len(kept) == 2
    assert not take_back(run, "001", {}, {}), "it is taken back already"
    assert take_back(run, "002", {2: Frame(CAPTIONS[2])}, {2: None})
    assert not drawn(draw(Story.read(run / "story.yaml"), model, run))
    assert but_history(run) == long


def test_only_the_last_append_is_taken_back(run: Path, model: StoryModel) -> None:
    longer = Story.from_captions([*CAPTIONS, "a fox is reading in the city"], title="Fox")
    draw(LONG, model, run, frames=[2])
    draw(longer, model, run, frames=[1, 3], redraw_seed=5)
    before = contents(run)
    with pytest.raises(InputError, match="frames 3 were appended after frames 2; take these back first"):
        take_back(run, "001", {}, {})
    for number, frames in (("002", {}), ("003", {}), ("001", {2: Frame("x")})):
        with pytest.raises(InputError, match="has no redraw"):
            take_back(run, number, frames, dict.fromkeys(frames))
    assert contents(run) == before
    assert take_back(run, "002", {1: Frame(CAPTIONS[1])}, {1: None}), "frame 1 as it was, frame 3 gone"
    draw(LONG, model, run)
    assert take_back(run, "001", {}, {})
    draw(SHORT, model, run)
    assert Story.read(run / "story.yaml").frames == SHORT.frames


@pytest.mark.parametrize("most", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_taking_an_append_back_killed_at_any_operation(
    run: Path, model: StoryModel, tmp_path: Path, most: int | None
) -> None:
    draw(LONG, model, run, frames=[2])
    (run / "notes.txt").write_text("mine", encoding="utf-8")

    def command(folder: Path) -> None:
        take_back(folder / "run", "001", {}, {})
        draw(Story.read(folder / "run" / "story.yaml"), model, folder / "run")

    check_every_operation(
        tmp_path / "trials",
        lambda folder: shutil.copytree(run, folder / "run"),
        command,
        most=most,
        look=contents,
    )
