"""Risk: another picture of a character is not what a redraw goes by, changes other frames, or cannot be undone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from killed import check_every_operation
from PIL import Image
from run_folders import contents, drawn, edit_manifest
from run_folders import draw as draw_two_at_once

from fastory import Character, Frame, InputError, Story, StoryModel, generate
from fastory.events import Event, Notice
from fastory.runs.take_back import GivenPictures, take_back

CAPTIONS = ["Mia is sleeping in the snow", "a fox is jumping in the forest", "Mia is standing on the beach"]
FEW: dict[str, Any] = {"steps": 1, "iterations": 1, "references_from": "last"}


def story_of(colour: str | None, prompt: str = "a cat") -> Story:
    pictures = () if colour is None else (Image.new("RGB", (64, 64), colour),)
    return Story.from_captions(CAPTIONS, title="Mia", characters=[Character("Mia", prompt, pictures)])


RED, BLUE = story_of("red"), story_of("blue")


def draw(story: Story, model: StoryModel, folder: Path, **options: Any) -> list[Event]:
    return draw_two_at_once(story, model, folder, **FEW, **options)


def as_of_before(manifest: dict[str, Any]) -> None:
    """As the first versions wrote it: a story's parts are not told apart."""
    del manifest["story"]["casts"], manifest["story"]["parts"]


def told(events: list[Event]) -> str:
    return " ".join(event.message for event in events if isinstance(event, Notice))


def pictures(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(folder).items() if name.startswith("iteration-")}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


@pytest.fixture(scope="module")
def red(model: StoryModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("red") / "run"
    draw(RED, model, folder)
    return folder


@pytest.fixture
def run(red: Path, tmp_path: Path) -> Path:
    shutil.copytree(red, tmp_path / "run")
    return tmp_path / "run"


def test_frames_that_are_redrawn_go_by_them_and_the_others_stay(
    run: Path, red: Path, model: StoryModel
) -> None:
    with pytest.raises(InputError, match=r"the story's characters.*--frames 0, ?2"):
        draw(BLUE, model, run)
    assert contents(run) == contents(red)
    assert not drawn(draw(BLUE, model, run, frames=[1])), "nobody whose pictures changed is in frame 1"
    events = draw(BLUE, model, run, frames=[0])
    assert drawn(events) == {(0, 0), (1, 0)} and "frames 2 stay as they were drawn" in told(events)
    before, after = pictures(red), pictures(run)
    # Pictures of characters are references from round 1 on.
    assert {name for name in before if before[name] != after[name]} == {"iteration-01/frame-000.png"}
    read = Story.read(run / "story.yaml")
    assert read.digest() == BLUE.digest() and "frames 2 stay" in told(draw(read, model, run))
    assert drawn(draw(read, model, run, frames=[2])) == {(0, 2), (1, 2)}, "no caption or seed changed"
    assert pictures(run)["iteration-01/frame-002.png"] != before["iteration-01/frame-002.png"]
    for frame in (0, 2):
        assert not drawn(draw(BLUE, model, run, frames=[frame])), "it was drawn with these"
    assert "stay as they were" not in told(draw(BLUE, model, run))


def test_another_prompt_counts_as_another_picture_does(run: Path, model: StoryModel) -> None:
    assert drawn(draw(story_of("red", "a bear"), model, run, frames=[2])) == {(0, 2), (1, 2)}


def test_a_manifest_of_before_does_not_say_what_frames_were_drawn_with(run: Path, model: StoryModel) -> None:
    edit_manifest(run, lambda manifest: manifest["story"].pop("casts"))
    assert not drawn(draw(RED, model, run, frames=[0]))
    assert "frames 2 stay" in told(draw(BLUE, model, run, frames=[0]))


def test_what_was_drawn_with_other_pictures_is_never_drawn_otherwise(run: Path, model: StoryModel) -> None:
    draw(story_of("red", "a bear"), model, run, frames=[0])
    (run / "iteration-00" / "frame-002.png").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be drawn again as it was"):
        draw(story_of("red", "a bear"), model, run)


def test_taking_it_back_has_the_pictures_again(run: Path, red: Path, model: StoryModel) -> None:
    """Those of the story, too, though no manifest lists them as its own but among all that it was given."""
    draw(BLUE, model, run, frames=[0])
    (reference,) = RED.characters[0].references
    earlier = GivenPictures({"Mia": (run / reference.name,)})  # type: ignore[union-attr]
    assert take_back(run, "001", {0: Frame(CAPTIONS[0])}, {0: None}, given_pictures=earlier)
    read = Story.read(run / "story.yaml")
    events = draw(read, model, run)
    assert not drawn(events) and "stay" not in told(events)
    assert pictures(run) == pictures(red) and read.digest() == RED.digest()
    assert not drawn(draw(RED, model, run, frames=[0, 2]))


def test_all_frames_go_on_from_another_first_one(model: StoryModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"mode": "causal", "steps": 1, "model": model, "output": tmp_path / "run"}
    list(generate(RED, **options))
    before = contents(tmp_path / "run")
    first = Image.new("RGB", (64, 64), "green")
    with pytest.raises(
        InputError, match="all frames go on from the first, which is another picture now; wanted 0-"
    ):
        list(generate(RED, first_frame=first, frames=slice(1, None), **options))
    assert contents(tmp_path / "run") == before
    assert not drawn(list(generate(BLUE, frames=slice(0, None), **options))), (
        "causal mode reads no such picture"
    )
    events = list(generate(RED, first_frame=first, frames=slice(0, None), **options))
    assert drawn(events) == {(0, 0), (0, 1), (0, 2)}
    list(generate(RED, first_frame=first, **{**options, "output": tmp_path / "once"}))
    assert pictures(tmp_path / "run") == pictures(tmp_path / "once")
    edit_manifest(tmp_path / "run", as_of_before)
    assert drawn(list(generate(RED, first_frame=first, frames=[2], redraw_seed=3, **options))) == {(0, 2)}


@pytest.mark.parametrize("most", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_killed_at_any_operation(red: Path, model: StoryModel, tmp_path: Path, most: int | None) -> None:
    def command(folder: Path) -> None:
        draw(BLUE, model, folder / "run", frames=[0])

    check_every_operation(
        tmp_path, lambda folder: shutil.copytree(red, folder / "run"), command, most=most, look=contents
    )
