"""Redrawing single frames: the others keep their bytes, the old pictures are kept, a kill in between is made good."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import CAPTIONS, FEW, contents, draw, drawn, edit_manifest

from fastory import InputError, Story, StoryModel, generate
from fastory.events import Event, FrameDrawn, Notice

EDITED = [CAPTIONS[0], "a fox is reading a book in the house", CAPTIONS[2]]


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


@pytest.fixture
def run(model: StoryModel, tmp_path: Path) -> Iterator[Path]:
    draw(Story.from_captions(CAPTIONS, title="Fox"), model, tmp_path / "run")
    yield tmp_path / "run"


def pictures(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(folder).items() if name.startswith("iteration-")}


def pause_after(events: Iterator[Event], pictures: int) -> None:
    """Draw that many pictures, then leave the run."""
    for event in events:
        pictures -= isinstance(event, FrameDrawn)
        if not pictures:
            break
    events.close()  # type: ignore[attr-defined]


def test_edited_frame_is_redrawn_in_every_round(run: Path, model: StoryModel) -> None:
    before = pictures(run)
    old = contents(run)
    assert drawn(draw(Story.from_captions(EDITED, title="Fox"), model, run, frames=[1])) == {
        (0, 1),
        (1, 1),
        (2, 1),
    }
    after = pictures(run)
    assert {name for name in before if before[name] != after[name]} == {
        f"iteration-0{k}/frame-001.png" for k in range(3)
    }
    assert contents(run)["history/001/iteration-02/frame-001.png"] == before["iteration-02/frame-001.png"]
    assert contents(run)["frames/frame-001.png"] == after["iteration-02/frame-001.png"]
    assert contents(run)["storybook.html"] != old["storybook.html"]
    assert Story.read(run / "story.yaml").frames[1].caption == EDITED[1]
    assert not (run / "redraw").exists()
    # the folder now belongs to the edited story
    assert not drawn(draw(Story.from_captions(EDITED, title="Fox"), model, run))


@pytest.mark.parametrize("second", [True, False])
def test_a_caption_may_bring_the_second_character_or_take_it_away(
    model: StoryModel, tmp_path: Path, second: bool
) -> None:
    """Whether characters have references of their own was decided when the run began."""
    one, two = CAPTIONS, [CAPTIONS[0], "a fox and a cat are standing in the house", CAPTIONS[2]]
    before, after = (one, two) if second else (two, one)
    draw(Story.from_captions(before, title="Fox"), model, tmp_path / "run", references="others")
    old = pictures(tmp_path / "run")
    edited = Story.from_captions(after, title="Fox")
    assert drawn(draw(edited, model, tmp_path / "run", references="others", frames=[1])) == {
        (k, 1) for k in range(3)
    }
    new = pictures(tmp_path / "run")
    assert {name[-7:-4] for name in old if old[name] != new[name]} == {"001"}
    assert not drawn(draw(edited, model, tmp_path / "run", references="others"))


def test_another_seed_for_single_frames(run: Path, model: StoryModel) -> None:
    before, story = pictures(run), Story.from_captions(CAPTIONS, title="Fox")
    draw(story, model, run, frames=[0, 2], redraw_seed=8)
    after = pictures(run)
    assert {name[-7:-4] for name in before if before[name] != after[name]} == {"000", "002"}
    events = draw(story, model, run, frames=[0, 2], redraw_seed=8)
    assert not drawn(events) and pictures(run) == after
    assert any("nothing to redraw" in event.message for event in events if isinstance(event, Notice))


def test_nothing_changed_is_nothing_to_redraw(run: Path, model: StoryModel) -> None:
    before = contents(run)
    events = draw(Story.from_captions(CAPTIONS, title="Fox"), model, run, frames=[1])
    assert not drawn(events) and contents(run) == before


def test_only_listed_frames_may_differ(run: Path, model: StoryModel) -> None:
    before = contents(run)
    with pytest.raises(InputError, match="frames 1"):
        draw(Story.from_captions(EDITED, title="Fox"), model, run, frames=[0])
    with pytest.raises(InputError, match="0 to 2, got 7"):
        draw(Story.from_captions(EDITED, title="Fox"), model, run, frames=[1, 7])
    with pytest.raises(InputError, match="steps"):
        draw(Story.from_captions(EDITED, title="Fox"), model, run, frames=[1], steps=3)
    assert contents(run) == before


def test_unfinished_run_cannot_be_redrawn(model: StoryModel, tmp_path: Path) -> None:
    story = Story.from_captions(CAPTIONS, title="Fox")
    events = generate(story, model=model, output=tmp_path, batch_size=2, **FEW)  # type: ignore[arg-type]
    for event in events:
        if isinstance(event, FrameDrawn):
            break
    events.close()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="not finished"):
        draw(Story.from_captions(EDITED, title="Fox"), model, tmp_path, frames=[1])
    with pytest.raises(InputError, match="no run to redraw"):
        draw(story, model, tmp_path / "nowhere", frames=[1])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_redraw_is_taken_up_again(
    stop: int, run: Path, model: StoryModel, tmp_path: Path
) -> None:
    """Stopped after `stop` pictures, the folder still shows the old ones; the same command finishes it."""
    story, before = Story.from_captions(EDITED, title="Fox"), pictures(run)
    events = generate(story, model=model, output=run, batch_size=2, frames=[1], **FEW)  # type: ignore[arg-type]
    pause_after(events, stop)
    assert pictures(run) == before
    with pytest.raises(InputError, match="unfinished redraw of frames 1"):
        draw(story, model, run)
    assert len(drawn(draw(story, model, run, frames=[1]))) == 3 - stop
    draw(Story.from_captions(CAPTIONS, title="Fox"), model, tmp_path / "other")
    draw(story, model, tmp_path / "other", frames=[1])
    assert pictures(run) == pictures(tmp_path / "other")


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_killed_while_new_pictures_move_in(moved: int, run: Path, model: StoryModel, tmp_path: Path) -> None:
    """The manifest decides the move; any number of files may have moved when the process died."""
    story = Story.from_captions(EDITED, title="Fox")
    draw(Story.from_captions(CAPTIONS, title="Fox"), model, tmp_path / "whole")
    draw(story, model, tmp_path / "whole", frames=[1])
    events = generate(story, model=model, output=run, batch_size=2, frames=[1], **FEW)  # type: ignore[arg-type]
    pause_after(events, 3)
    moving = {"history": "history/001", "story": story.to_yaml(run)}
    edit_manifest(run, lambda manifest: manifest["redraw"].update(moving=moving))
    for k in range(moved):
        name = f"iteration-{k:02d}/frame-001.png"
        kept = run / "history/001" / name
        kept.parent.mkdir(parents=True)
        (run / name).rename(kept)
        if k < moved - 1:  # of the last, only the old picture went away
            (run / "redraw" / name).rename(run / name)
    assert not drawn(draw(story, model, run, frames=[1]))
    assert contents(run) == contents(tmp_path / "whole")


@pytest.mark.parametrize("how", ["another text", "another seed"])
def test_the_command_of_the_run_gives_an_unfinished_redraw_up(how: str, run: Path, model: StoryModel) -> None:
    """It used to draw the frame's old text into the redraw, and to move that in."""
    before, story = contents(run), Story.from_captions(CAPTIONS, title="Fox")
    edited = Story.from_captions(EDITED, title="Fox") if how == "another text" else story
    options = {"frames": [1]} if how == "another text" else {"frames": [1], "redraw_seed": 9}
    pause_after(generate(edited, model=model, output=run, batch_size=2, **options, **FEW), 1)  # type: ignore[arg-type]
    events = draw(story, model, run)
    assert any("given up" in event.message for event in events if isinstance(event, Notice))
    assert not drawn(events) and contents(run) == before


def test_a_redraw_does_not_draw_what_it_keeps(run: Path, model: StoryModel) -> None:
    """A kept picture that was damaged meanwhile came about beside the old frame: beside the new one it would differ."""
    before, edited = contents(run), Story.from_captions(EDITED, title="Fox")
    pause_after(generate(edited, model=model, output=run, batch_size=2, frames=[1], **FEW), 2)  # type: ignore[arg-type]
    (run / "iteration-01" / "frame-000.png").write_bytes(b"")
    with pytest.raises(InputError, match="damaged or missing, and this redraw keeps it"):
        draw(edited, model, run, frames=[1])
    assert drawn(draw(Story.read(run / "story.yaml"), model, run)) == {(1, 0)}
    assert contents(run) == before


def test_a_picture_that_was_drawn_beside_since_redrawn_frames_is_never_drawn_otherwise(
    run: Path, model: StoryModel
) -> None:
    """Frame 0 of a later round saw the old frame 1; drawn again it would see the new one, and nobody would know."""
    story = Story.from_captions(EDITED, title="Fox")
    draw(story, model, run, frames=[1])
    before = contents(run)
    lost = run / "iteration-01" / "frame-000.png"
    lost.write_bytes(b"")
    with pytest.raises(InputError, match=r"frame-000.png is damaged or missing.*--frames 0 --redraw-seed N"):
        draw(story, model, run)
    assert drawn(draw(story, model, run, frames=[0], redraw_seed=5)) == {(0, 0), (1, 0), (2, 0)}
    (run / "iteration-01" / "frame-000.png").unlink()  # drawn beside what is there now
    assert drawn(draw(story, model, run)) == {(1, 0)}
    (run / "iteration-00" / "frame-002.png").unlink()  # round 0 sees no other frame
    assert drawn(draw(story, model, run)) == {(0, 2)}
    assert contents(run)["iteration-00/frame-002.png"] == before["iteration-00/frame-002.png"]
