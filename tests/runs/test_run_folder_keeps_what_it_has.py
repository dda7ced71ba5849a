"""A run folder loses nothing: other stories, damaged files, second processes, full disks, redrawn frames."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from run_folders import CAPTIONS, FEW, contents, draw, drawn, edit_manifest

from fastory import InputError, Story, StoryModel, generate
from fastory.errors import FastoryError
from fastory.events import BatchChosen, FrameDrawn, Notice, StoryFinished, StoryStarted
from fastory.runs.folder import RunFolder


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


@pytest.fixture
def story() -> Story:
    return Story.from_captions(CAPTIONS, title="Fox")


def test_folder_holds_every_round_the_final_pictures_and_what_to_look_at(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    events = draw(story, model, tmp_path / "run")
    names = set(contents(tmp_path / "run"))
    rounds = {f"iteration-{k:02d}/frame-{i:03d}.png" for k in range(3) for i in range(3)}
    assert names == rounds | {f"frames/frame-{i:03d}.png" for i in range(3)} | {
        "manifest.json",
        "story.yaml",
        "sheet.png",
        "storybook.html",
    }
    assert (tmp_path / "run/frames/frame-001.png").read_bytes() == (
        tmp_path / "run/iteration-02/frame-001.png"
    ).read_bytes()
    assert Story.read(tmp_path / "run/story.yaml").digest() == story.digest()
    assert isinstance(events[-1], StoryFinished) and events[-1].folder == tmp_path / "run"


def test_png_says_how_it_was_made(story: Story, model: StoryModel, tmp_path: Path) -> None:
    draw(story, model, tmp_path / "run", seed=5)
    with Image.open(tmp_path / "run/iteration-01/frame-002.png") as image:
        image.load()
        assert image.mode == "RGB"
        chunk = json.loads(image.info["fastory"])  # type: ignore[attr-defined]
        parameters = image.info["parameters"]
    assert (chunk["schema"], chunk["round"], chunk["frame"], chunk["prompt"]) == (1, 1, 2, CAPTIONS[2])
    assert parameters.startswith(CAPTIONS[2]) and "Steps: 2" in parameters


def test_no_file_but_the_manifest_holds_time_path_or_host(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    """Two folders, two moments: the same bytes."""
    draw(story, model, tmp_path / "a" / "run")
    draw(story, model, tmp_path / "b" / "elsewhere")
    assert contents(tmp_path / "a" / "run") == contents(tmp_path / "b" / "elsewhere")
    for path in (tmp_path / "a").rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes()


def test_finished_run_is_left_alone(story: Story, model: StoryModel, tmp_path: Path) -> None:
    draw(story, model, tmp_path)
    before = contents(tmp_path)
    events = draw(story, model, tmp_path)
    assert not drawn(events) and contents(tmp_path) == before
    assert isinstance(events[0], StoryStarted) and events[0].finished == events[0].total == 9


@pytest.mark.parametrize("damage", ["missing", "truncated", "another picture"])
def test_damaged_picture_is_made_anew(damage: str, story: Story, model: StoryModel, tmp_path: Path) -> None:
    draw(story, model, tmp_path)
    before, victim = contents(tmp_path), tmp_path / "iteration-01" / "frame-001.png"
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:100])
    else:
        victim.write_bytes((tmp_path / "iteration-00" / "frame-001.png").read_bytes())
    assert drawn(draw(story, model, tmp_path)) == {(1, 1)}
    assert contents(tmp_path) == before


@pytest.mark.parametrize("product", ["sheet.png", "storybook.html", "frames/frame-000.png"])
def test_damaged_product_is_made_anew(product: str, story: Story, model: StoryModel, tmp_path: Path) -> None:
    draw(story, model, tmp_path)
    before = contents(tmp_path)
    (tmp_path / product).write_bytes(b"")
    assert not drawn(draw(story, model, tmp_path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 3}, "steps: 2 there, 3 here"),
        ({"seed": 9}, "seed: 0 there, 9 here"),
        ({"references": "all"}, "references: 'others' there, 'all' here"),
    ],
)
def test_other_settings_are_refused_by_name(
    change: dict[str, object], said: str, story: Story, model: StoryModel, tmp_path: Path
) -> None:
    draw(story, model, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=said) as error:
        draw(story, model, tmp_path, **change)
    assert "--overwrite" in str(error.value)
    assert contents(tmp_path) == before
    draw(story, model, tmp_path, overwrite=True, **change)
    assert contents(tmp_path) != before


def test_another_story_is_refused(story: Story, model: StoryModel, tmp_path: Path) -> None:
    draw(story, model, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="frames 1"):
        draw(Story.from_captions([CAPTIONS[0], "a bear", CAPTIONS[2]], title="Fox"), model, tmp_path)
    with pytest.raises(InputError, match="the story: 'Fox' there, 'Bear' here"):
        draw(Story.from_captions(CAPTIONS, title="Bear"), model, tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_of_other_files_is_never_written_into(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"not a run folder.*thesis\.tex"):
            draw(story, model, tmp_path, overwrite=overwrite)
    assert contents(tmp_path).keys() == {"thesis.tex"}


def test_overwrite_leaves_files_of_other_names(story: Story, model: StoryModel, tmp_path: Path) -> None:
    draw(story, model, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    draw(story, model, tmp_path, overwrite=True, seed=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite_removes_nothing_before_every_story_is_accepted(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    list(generate(story, model=model, output=tmp_path / "fox", **FEW))  # type: ignore[arg-type]
    before = contents(tmp_path)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "thesis.tex").write_text("years of work")
    other = Story.from_captions(CAPTIONS, title="Two")
    with pytest.raises(InputError, match="not a run folder"):
        generate([story, other], model=model, output=tmp_path, overwrite=True, **FEW)  # type: ignore[arg-type]
    assert contents(tmp_path / "fox") == {
        name.removeprefix("fox/"): digest for name, digest in before.items()
    }
    with pytest.raises(InputError, match="one of the two"):
        generate(story, model=model, output=tmp_path / "fox", overwrite=True, frames=[0])


def test_the_same_story_twice_is_refused(story: Story, model: StoryModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="given twice"):
        generate([story, story], model=model, under=tmp_path, **FEW)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("manifest", "said"),
    [('{"schema": 99}', "schema 99"), ("{", "damaged"), ('{"schema": 1}', "damaged"), ("[]", "damaged")],
)
def test_manifest_that_cannot_be_read_is_refused(
    manifest: str, said: str, story: Story, model: StoryModel, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=said):
        draw(story, model, tmp_path)
    assert (tmp_path / "manifest.json").read_text() == manifest


def test_two_processes_on_one_folder(story: Story, model: StoryModel, tmp_path: Path) -> None:
    held = RunFolder(tmp_path)
    with pytest.raises(FastoryError, match="another process"):
        draw(story, model, tmp_path)
    held.close()
    assert drawn(draw(story, model, tmp_path))


def test_lock_is_free_after_an_abandoned_run(story: Story, model: StoryModel, tmp_path: Path) -> None:
    events = generate(story, model=model, output=tmp_path, batch_size=2, **FEW)  # type: ignore[arg-type]
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert len(drawn(draw(story, model, tmp_path))) == 9


def test_resume_uses_the_stored_batch_size(story: Story, model: StoryModel, tmp_path: Path) -> None:
    draw(story, model, tmp_path / "whole")
    events = generate(story, model=model, output=tmp_path / "cut", batch_size=2, **FEW)  # type: ignore[arg-type]
    for event in events:
        if isinstance(event, FrameDrawn) and (event.round, event.frame) == (1, 0):
            break
    events.close()  # type: ignore[attr-defined]
    resumed = list(generate(story, model=model, output=tmp_path / "cut", batch_size=3, **FEW))  # type: ignore[arg-type]
    chosen = [event for event in resumed if isinstance(event, BatchChosen)]
    assert chosen[0].size == 2 and "began" in chosen[0].reason
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_other_library_versions_are_a_notice(story: Story, model: StoryModel, tmp_path: Path) -> None:
    draw(story, model, tmp_path)
    edit_manifest(tmp_path, lambda manifest: manifest["machine"]["versions"].update(torch="2.11.0"))
    notices = [event.message for event in draw(story, model, tmp_path) if isinstance(event, Notice)]
    assert any("torch 2.11.0 ->" in message for message in notices)


def test_run_of_another_type_goes_on_in_its_own(story: Story, tmp_path: Path) -> None:
    """A resume uses the stored device and type: what `auto` means today does not matter."""
    draw(story, StoryModel.open("builtin", dtype="bfloat16"), tmp_path / "a", iterations=0)
    before = contents(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["machine"]["dtype"] == "bfloat16"
    (tmp_path / "a" / "iteration-00" / "frame-000.png").unlink()
    assert drawn(draw(story, StoryModel.open("builtin"), tmp_path / "a", iterations=0)) == {(0, 0)}
    assert contents(tmp_path / "a") == before
    with pytest.raises(InputError, match="bfloat16 there, float32 here"):
        draw(story, StoryModel.open("builtin", dtype="float32"), tmp_path / "a", iterations=0)


def test_full_disk_ends_with_one_message_and_keeps_what_is_finished(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(FastoryError, match="the disk is full") as error:
            draw(story, model, disk / "run")
        assert error.value.exit_code == 1
        left = contents(disk / "run")
        assert not [name for name in left if "partial" in name]
        manifest = json.loads((disk / "run" / "manifest.json").read_text())
        assert manifest["pictures"]
        for k, pictures in manifest["pictures"].items():
            for i, record in pictures.items():
                assert left[f"iteration-{int(k):02d}/frame-{int(i):03d}.png"] == record["sha256"]
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        draw(story, model, disk / "run")
        draw(story, model, tmp_path / "whole")
        assert contents(disk / "run") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_nothing_is_written_without_a_folder(
    story: Story, model: StoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    events = list(generate(story, model=model, **FEW))  # type: ignore[arg-type]
    assert len(drawn(events)) == 9 and not list(tmp_path.iterdir())


def test_several_stories_get_folders_of_their_own(story: Story, model: StoryModel, tmp_path: Path) -> None:
    twin = Story.from_captions(CAPTIONS[:1], title="Fox")
    other = Story.from_captions(CAPTIONS[1:], title="Two")
    list(generate([story, twin, other], model=model, output=tmp_path, **FEW))  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"fox", "fox-2", "two"}


def test_default_folder_is_named_by_story_and_settings(
    story: Story, model: StoryModel, tmp_path: Path
) -> None:
    list(generate(story, model=model, under=tmp_path, **FEW))  # type: ignore[arg-type]
    list(generate(story, model=model, under=tmp_path, seed=1, **FEW))  # type: ignore[arg-type]
    list(generate(story, model=model, under=tmp_path, **FEW))  # type: ignore[arg-type]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and all(
        len(name) == len("fox-12345678") and name.startswith("fox-") for name in names
    )
