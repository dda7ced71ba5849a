"""Risk: what a redraw replaced does not come back as it was, other frames change, or a kill leaves neither of the two."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from killed import check_every_operation
from run_folders import CAPTIONS, FEW, contents, draw, drawn, edit_manifest

from fastory import Frame, InputError, Story, StoryModel, generate
from fastory.runs.take_back import take_back

EARLIER = {1: Frame(CAPTIONS[1])}
OTHER = [CAPTIONS[0], "a cat is sleeping in the house", CAPTIONS[2]]


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


@pytest.fixture(scope="module")
def finished(model: StoryModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    draw(Story.from_captions(CAPTIONS, title="Fox"), model, folder)
    return folder


@pytest.fixture(scope="module")
def redrawn(finished: Path, model: StoryModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("redrawn") / "run"
    shutil.copytree(finished, folder)
    draw(Story.from_captions(OTHER, title="Fox"), model, folder, frames=[1], redraw_seed=7)
    return folder


@pytest.fixture
def run(redrawn: Path, tmp_path: Path) -> Path:
    shutil.copytree(redrawn, tmp_path / "run")
    return tmp_path / "run"


def looked_at(folder: Path) -> dict[str, str]:
    """All but the history and the manifest, which say that there was a redraw."""
    return {
        name: digest
        for name, digest in contents(folder).items()
        if not name.startswith("history/") and name != "manifest.json"
    }


def test_what_was_there_is_there_again(run: Path, finished: Path, redrawn: Path, model: StoryModel) -> None:
    assert looked_at(run) != looked_at(finished)
    assert take_back(run, "001", EARLIER, {1: None})
    story = Story.read(run / "story.yaml")
    assert not drawn(draw(story, model, run))  # sheet, storybook and final pictures alone
    assert looked_at(run) == looked_at(finished)
    assert not drawn(draw(story, model, run, frames=[1]))
    assert looked_at(run) == looked_at(finished), "a redraw without a change drew something"
    replaced = {name: digest for name, digest in contents(run).items() if name.startswith("history/002/")}
    assert len(replaced) == 3 and all(looked_at(redrawn)[name[12:]] == replaced[name] for name in replaced)


def test_taking_back_can_be_taken_back(run: Path, redrawn: Path, model: StoryModel) -> None:
    assert take_back(run, "001", EARLIER, {1: None})
    draw(Story.read(run / "story.yaml"), model, run)
    assert take_back(run, "002", {1: Frame(OTHER[1])}, {1: 7})
    story = Story.read(run / "story.yaml")
    assert not drawn(draw(story, model, run))
    assert looked_at(run) == looked_at(redrawn)


def test_the_same_twice_changes_nothing(run: Path) -> None:
    assert take_back(run, "001", EARLIER, {1: None})
    before = contents(run)
    assert not take_back(run, "001", EARLIER, {1: None})
    assert contents(run) == before


def test_what_cannot_be_taken_back_is_refused_and_changes_nothing(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    for number, frames in (("002", EARLIER), ("001", {0: Frame("x")}), ("../001", EARLIER)):
        with pytest.raises(InputError, match="has no redraw"):
            take_back(run, number, frames, dict.fromkeys(frames))
    assert contents(run) == before
    edit_manifest(run, lambda manifest: manifest.update(products={}))
    before = contents(run)
    with pytest.raises(InputError, match="is not finished"):
        take_back(run, "001", EARLIER, {1: None})
    assert contents(run) == before
    with pytest.raises(InputError, match="there is no run"):
        take_back(tmp_path / "nothing", "001", EARLIER, {1: None})


@pytest.mark.parametrize("most", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_killed_at_any_operation(redrawn: Path, model: StoryModel, tmp_path: Path, most: int | None) -> None:
    def command(folder: Path) -> None:
        take_back(folder / "run", "001", EARLIER, {1: None})
        list(
            generate(
                Story.read(folder / "run" / "story.yaml"),
                model=model,
                output=folder / "run",
                batch_size=2,
                **FEW,
            )
        )

    check_every_operation(
        tmp_path, lambda folder: shutil.copytree(redrawn, folder / "run"), command, most=most, look=contents
    )
