"""No file of a user's is removed, replaced or written through a link, whatever its name; only a manifest's files are ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from run_folders import CAPTIONS, contents, draw, drawn, edit_manifest

from fastory import InputError, Story, StoryModel, generate
from fastory.events import FrameDrawn, Notice
from fastory.runs.folder import RunFolder

ONE = {"steps": 1, "iterations": 1, "references_from": "last"}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


@pytest.fixture
def story() -> Story:
    return Story.from_captions(CAPTIONS[:2], title="Fox")


def tree(folder: Path) -> dict[str, str]:
    """Every path with what it holds, links unfollowed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        else:
            found[str(path.relative_to(folder))] = (
                "folder" if path.is_dir() else path.read_bytes().hex()[:999]
            )
    return found


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["story.yaml", "frames/frame-000.png", "history/diary.md"],
        ["a/.thesis.partial", "readme"],
        ["iteration-00/frame-000.png"],
        ["sheet.png"],
        [".lock/file"],
        [".hidden"],
        ["history/001/iteration-00/frame-000.png", "redraw/x"],
    ],
    ids=lambda names: names[0],
)
def test_a_folder_without_a_manifest_is_refused_before_anything_changes(
    names: list[str], overwrite: bool, story: Story, model: StoryModel, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="not a run folder"):
        draw(story, model, tmp_path, overwrite=overwrite)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "text", ['{"name": "an app", "icons": []}', '{"schema": 1}', "[]", '{"schema": true}', "[" * 100_000]
)
def test_another_programs_manifest_is_refused_even_with_overwrite(
    text: str, story: Story, model: StoryModel, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text(text)
    (tmp_path / "story.yaml").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"manifest\.json"):
            draw(story, model, tmp_path, overwrite=overwrite)
    assert (tmp_path / "manifest.json").read_text() == text and (
        tmp_path / "story.yaml"
    ).read_text() == "mine"


def test_a_killed_beginning_is_taken_up(story: Story, model: StoryModel, tmp_path: Path) -> None:
    """What a process leaves that was killed before its manifest stood: a lock, and half a manifest."""
    (tmp_path / ".lock").touch()
    (tmp_path / ".manifest.json.partial").write_text('{"schem')
    assert drawn(draw(story, model, tmp_path, **ONE)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert not (tmp_path / ".manifest.json.partial").exists()


def test_overwriting_clears_what_the_manifest_lists_and_nothing_else(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    draw(story, model, tmp_path, **ONE)
    draw(story, model, tmp_path, frames=[1], redraw_seed=5, **ONE)
    assert (tmp_path / "history/001/iteration-01/frame-001.png").exists()
    mine = [
        "notes.txt",
        "frames/me.png",
        "history/diary.md",
        "history/001/kept",
        "redraw/plan.md",
        ".x.partial",
        "iteration-09/frame-000.png",
    ]
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    short = Story.from_captions(CAPTIONS[:1], title="Short")
    draw(short, model, tmp_path, overwrite=True, steps=1, iterations=0)
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    found = {name for name in contents(tmp_path) if name not in mine}
    assert found == {
        "manifest.json",
        "story.yaml",
        "iteration-00/frame-000.png",
        "frames/frame-000.png",
        "sheet.png",
        "storybook.html",
    }


def test_overwriting_never_replaces_a_file_that_the_old_run_does_not_list(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    draw(story, model, tmp_path, steps=1, iterations=0)
    (tmp_path / "iteration-01").mkdir()
    (tmp_path / "iteration-01" / "frame-001.png").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="in the way"):
        draw(story, model, tmp_path, overwrite=True, **ONE)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["frames", "iteration-00", "iteration-01", "history", "redraw"])
@pytest.mark.parametrize("how", ["resume", "overwrite", "redraw"])
def test_nothing_is_written_through_a_link(
    name: str, how: str, story: Story, model: StoryModel, tmp_path: Path
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    draw(story, model, run, **ONE)
    if (run / name).exists():
        (run / name).rename(elsewhere)
    else:
        elsewhere.mkdir()
    (run / name).symlink_to(elsewhere)
    draw_all = {"resume": {}, "overwrite": {"overwrite": True}, "redraw": {"frames": [1], "redraw_seed": 3}}
    # links to folders in which the command has nothing to do are left alone
    (run / "sheet.png").unlink()
    before = tree(elsewhere)
    try:
        draw(story, model, run, **ONE, **draw_all[how])
    except InputError as error:
        assert "symbolic link" in str(error)
    else:
        assert name in ("history", "redraw") and how != "redraw"
    assert tree(elsewhere) == before


def test_a_redraw_never_leads_outside(story: Story, model: StoryModel, tmp_path: Path) -> None:
    run = tmp_path / "run"
    draw(story, model, run, **ONE)
    events = generate(story, model=model, output=run, frames=[1], redraw_seed=5, batch_size=2, **ONE)  # type: ignore[arg-type]
    for event in events:
        if isinstance(event, FrameDrawn) and event.round == 1:
            break
    events.close()  # type: ignore[attr-defined]
    for outside in ("../escaped", str(tmp_path / "escaped"), "history/../../escaped", "history/1"):
        moving = {"history": outside, "story": "x"}
        edit_manifest(run, lambda manifest, moving=moving: manifest["redraw"].update(moving=moving))  # type: ignore[misc]
        with pytest.raises(InputError, match="damaged"):
            draw(story, model, run, frames=[1], redraw_seed=5, **ONE)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_changed_byte_of_the_manifest_is_found(story: Story, model: StoryModel, tmp_path: Path) -> None:
    """Without the checksum such a run ends with exit 0 and other pictures: a frame left out that was not."""
    draw(story, model, tmp_path, **ONE)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["pictures"]["0"]["1"]["left_out"] = "is unsafe"
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="checksum"):
        draw(story, model, tmp_path, **ONE)


def test_a_run_of_an_earlier_version_still_opens(story: Story, model: StoryModel, tmp_path: Path) -> None:
    """Manifests before the checksum, the story's parts, the frames' seeds and the list of history."""
    draw(story, model, tmp_path, **ONE)
    before = contents(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("checksum", "story_file"):
        del manifest[name]
    for name in ("parts", "seeds"):
        del manifest["story"][name]
    path.write_text(json.dumps(manifest))
    (tmp_path / "iteration-01" / "frame-001.png").unlink()
    assert drawn(draw(story, model, tmp_path, **ONE)) == {(1, 1)}
    after = contents(tmp_path)
    assert {name: value for name, value in after.items() if name != "manifest.json"} == {
        name: value for name, value in before.items() if name != "manifest.json"
    }
    draw(story, model, tmp_path, frames=[0], redraw_seed=9, **ONE)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no text"])
def test_a_damaged_story_yaml_is_written_again(
    damage: str, story: Story, model: StoryModel, tmp_path: Path
) -> None:
    draw(story, model, tmp_path, **ONE)
    before, file = contents(tmp_path), tmp_path / "story.yaml"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:12] if damage == "truncated" else b"\xff\xfe")
    assert not drawn(draw(story, model, tmp_path, **ONE))
    assert contents(tmp_path) == before


def test_an_edited_story_yaml_is_left_and_said(story: Story, model: StoryModel, tmp_path: Path) -> None:
    draw(story, model, tmp_path, **ONE)
    file = tmp_path / "story.yaml"
    file.write_text("# mine\n" + file.read_text())
    events = draw(story, model, tmp_path, **ONE)
    assert any("was changed" in event.message for event in events if isinstance(event, Notice))
    assert not any(isinstance(e, Notice) for e in draw(Story.read(file), model, tmp_path, **ONE))
    assert file.read_text().startswith("# mine")


def test_an_interrupted_overwriting_goes_on_with_the_same_command(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    """It used to begin anew at every attempt, so that it might never end."""
    draw(story, model, tmp_path / "run", steps=1, iterations=0)
    one_by_one = {"model": model, "batch_size": 1, **ONE}  # a micro-batch is recorded as a whole
    list(generate(story, output=tmp_path / "whole", **one_by_one))  # type: ignore[arg-type]
    events = generate(story, output=tmp_path / "run", overwrite=True, **one_by_one)  # type: ignore[arg-type]
    for event in events:
        if isinstance(event, FrameDrawn) and event.round == 1:
            break
    events.close()  # type: ignore[attr-defined]
    assert drawn(draw(story, model, tmp_path / "run", overwrite=True, **ONE)) == {(1, 1)}
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert len(drawn(draw(story, model, tmp_path / "run", overwrite=True, **ONE))) == 4


def test_closing_a_run_that_was_never_begun_leaves_nothing(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    events = generate(story, model=model, output=tmp_path / "new" / "run", **ONE)  # type: ignore[arg-type]
    events.close()  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())
    events = generate(story, model=model, output=tmp_path / "run", **ONE)  # type: ignore[arg-type]
    del events
    RunFolder(tmp_path / "run").close()


def test_what_is_no_file_in_a_files_place_is_one_line(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    draw(story, model, tmp_path, **ONE)
    for name in ("iteration-00/frame-001.png", "frames/frame-000.png", "sheet.png", "story.yaml"):
        place = tmp_path / name
        data = place.read_bytes()
        for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/null")):
            place.unlink()
            make(place)  # type: ignore[operator]
            for overwrite in (False, True):
                with pytest.raises(InputError, match="where this run has a file"):
                    draw(story, model, tmp_path, overwrite=overwrite, **ONE)
            place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()
            place.write_bytes(data)
    assert not drawn(draw(story, model, tmp_path, **ONE))


@pytest.mark.parametrize(
    ("frames", "redraw_seed", "said"),
    [
        ([-1], None, "-1"),
        ([0], 2**63, "seed"),
        ([0], -1, "seed"),
        ([0], 10**400, "seed"),
        ([0], True, "seed"),
        (None, 5, "frames"),
        (["a"], None, "frames"),
    ],
)
def test_a_redraw_is_checked_before_it_is_recorded(
    frames: list[int] | None,
    redraw_seed: int | None,
    said: str,
    story: Story,
    model: StoryModel,
    tmp_path: Path,
) -> None:
    draw(story, model, tmp_path, noise="shared", **ONE)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=said):
        draw(story, model, tmp_path, noise="shared", frames=frames, redraw_seed=redraw_seed, **ONE)
    assert tree(tmp_path) == before


def test_a_redraw_seed_counts_before_the_frames_own(model: StoryModel, tmp_path: Path) -> None:
    file = tmp_path / "story.yaml"
    text = "frames:\n  - a fox is sleeping\n  - {caption: a fox is jumping, seed: 7}\n"
    file.write_text(text)
    run = tmp_path / "run"
    draw(Story.read(file), model, run, **ONE)
    seven = (run / "iteration-00/frame-001.png").read_bytes()
    draw(Story.read(file), model, run, frames=[1], redraw_seed=5, **ONE)
    five = (run / "iteration-00/frame-001.png").read_bytes()
    assert five != seven
    # the same bytes would come of it: never run
    assert not drawn(draw(Story.read(file), model, run, frames=[1], redraw_seed=5, **ONE))
    assert not (run / "history" / "002").exists()
    # what was said last counts
    file.write_text(text.replace("seed: 7", "seed: 8"))
    assert drawn(draw(Story.read(file), model, run, frames=[1], **ONE))
    assert (run / "iteration-00/frame-001.png").read_bytes() not in (five, seven)


def test_a_seed_that_draws_the_same_noise_is_nothing_to_redraw(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    draw(story, model, tmp_path, noise="shared", seed=3, **ONE)
    assert not drawn(draw(story, model, tmp_path, noise="shared", seed=3, frames=[1], redraw_seed=3, **ONE))
    assert not (tmp_path / "history").exists()


def test_differences_name_what_differs(model: StoryModel, tmp_path: Path) -> None:
    """A story with a frame more has the same title: the title twice says nothing."""
    draw(Story.from_captions(CAPTIONS[:2], title="Fox"), model, tmp_path, **ONE)
    longer = Story.from_captions([CAPTIONS[0], "a fox is running", CAPTIONS[1]], title="Fox")
    with pytest.raises(InputError, match="2 there, 3 here \\(frame 1 here is not there\\)"):
        draw(longer, model, tmp_path, **ONE)
    shorter = Story.from_captions(CAPTIONS[:1], title="Fox")
    with pytest.raises(InputError, match="2 there, 1 here \\(frame 1 there is not here\\)"):
        draw(shorter, model, tmp_path, **ONE)
    file = tmp_path / "other.yaml"
    file.write_text(
        "title: Fox\nstyle: comic\nnegative_prompt: blur\nframes:\n  - " + "\n  - ".join(CAPTIONS[:2])
    )
    with pytest.raises(InputError) as error:
        draw(Story.read(file), model, tmp_path, **ONE)
    assert "the story's style" in str(error.value) and "the story's negative prompt" in str(error.value)
    assert "'Fox' there" not in str(error.value)
