"""Story-Adapter without initialization, and with fixed weights: the papers' ablations are settings, and are what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_rounds import CAPTIONS, PAPERS
from PIL import Image
from run_folders import contents
from typer.testing import CliRunner

from fastory import InputError, Story, StoryModel, draw, generate
from fastory.cli import app
from fastory.events import FrameDrawn, RoundStarted

FEW: dict[str, Any] = {"steps": 2, "noise": "per-frame", "batch_size": 2, "regions": "off", **PAPERS}
STORY = CAPTIONS[:3]


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


@pytest.fixture(scope="module")
def first(model: StoryModel) -> list[Image.Image]:
    """What captions alone give."""
    return draw(STORY, model=model, mode="plain", **FEW).images


def data(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def test_given_pictures_stand_in_place_of_round_zero(model: StoryModel, first: list[Image.Image]) -> None:
    """The pictures that round 0 would draw give the later rounds it would give; others give others."""
    drawn = draw(STORY, model=model, iterations=2, **FEW)
    given = draw(STORY, model=model, iterations=2, initial_pictures=first, **FEW)
    assert [data(images) for images in given.rounds] == [data(images) for images in drawn.rounds]
    others = draw(STORY, model=model, iterations=1, initial_pictures=first[::-1], **FEW)
    assert data(others.rounds[0]) == data(first[::-1])
    assert data(others.images) != data(drawn.rounds[1])


def test_one_picture_for_all_is_one_reference(model: StoryModel, first: list[Image.Image]) -> None:
    """A softmax over copies of one picture is that over the picture: within rounding, what the reference paradigm draws."""
    how: dict[str, Any] = {**FEW, "reference_scale": 0.6, "initial_pictures": first[1]}
    iterative = draw(STORY, model=model, iterations=1, **how).images
    reference = draw(STORY, model=model, mode="reference", **how).images
    assert [difference(a, b) <= 1 for a, b in zip(iterative, reference, strict=True)] == [True] * 3
    # the check can fail: another picture is far from it
    other = draw(STORY, model=model, mode="reference", **{**how, "initial_pictures": first[0]}).images
    assert difference(reference[0], other[0]) > 3


def test_a_picture_of_another_shape_is_cropped_to_the_frames(model: StoryModel) -> None:
    wide = Image.linear_gradient("L").convert("RGB").resize((400, 100))
    drawn = draw(STORY[:1], model=model, iterations=1, initial_pictures=wide, **FEW)
    assert drawn.rounds[0][0].size == drawn.images[0].size == (128, 128)


def test_a_run_with_given_pictures_goes_on_and_is_redrawn(
    model: StoryModel, first: list[Image.Image], tmp_path: Path
) -> None:
    """They are kept in the run folder, whose story.yaml reads back to the same story; another picture is another run."""
    how: dict[str, Any] = {**FEW, "iterations": 1, "model": model, "initial_pictures": first}
    for run in ("whole", "cut"):
        events = generate(Story.from_captions(STORY), output=tmp_path / run, **how)
        for event in events:
            if run == "cut" and isinstance(event, FrameDrawn) and (event.round, event.frame) == (0, 1):
                events.close()  # type: ignore[attr-defined]
    list(generate(Story.from_captions(STORY), output=tmp_path / "cut", **how))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert Story.read(tmp_path / "cut" / "story.yaml").digest() == (
        replace(Story.from_captions(STORY), initial_pictures=tuple(first)).digest()
    )
    with pytest.raises(InputError, match="initial pictures"):
        generate(
            Story.from_captions(STORY), output=tmp_path / "cut", **{**how, "initial_pictures": first[::-1]}
        )
    again = list(
        generate(Story.from_captions(STORY), output=tmp_path / "cut", frames=[1], redraw_seed=3, **how)
    )
    assert [(e.round, e.frame) for e in again if isinstance(e, FrameDrawn)] == [(0, 1), (1, 1)]


def test_what_cannot_be_used_is_met_at_the_door(
    model: StoryModel, first: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="one picture for each of 3 frames, or one for all, got 2"):
        generate(STORY, model=model, iterations=1, initial_pictures=first[:2])
    with pytest.raises(InputError, match="in place of round 0; wanted 1 iteration or more, got 0"):
        generate(STORY, model=model, iterations=0, initial_pictures=first)
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text("\n".join(STORY))
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/a.png").write_text("no picture")
    for path, said in (("empty", "a folder without any"), ("bad", "bad/a.png"), ("none.png", "no such file")):
        ended = CliRunner().invoke(app, ["generate", "story.txt", "--initial-pictures", path, "-o", "run"])
        assert ended.exit_code == 2 and "--initial-pictures" in ended.stderr and said in ended.stderr
    assert not Path("run").exists()


def test_a_folder_of_pictures_is_read_in_the_order_of_names(
    model: StoryModel, first: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text("\n".join(STORY))
    Path("start").mkdir()
    for i, image in reversed(list(enumerate(first[::-1]))):
        image.save(f"start/frame-{i:03d}.png")
    Path("start/notes.txt").write_text("not a picture")
    few = [
        "--references-from",
        "last",
        "--reference-saturation=1",
        "--scheduler",
        "ddim",
        "--regions",
        "off",
        "--iterations",
        "1",
        "--steps",
        "2",
        "--noise",
        "per-frame",
        "--batch-size",
        "2",
        "-o",
        "run",
    ]
    ended = CliRunner().invoke(app, ["generate", "story.txt", "--initial-pictures", "start", *few])
    assert ended.exit_code == 0, ended.stderr
    drawn = draw(STORY, model=model, iterations=1, initial_pictures=first[::-1], **FEW)
    shown = [Image.open(f"run/iteration-01/frame-{i:03d}.png") for i in range(3)]
    assert data(shown) == data(drawn.images)


@pytest.mark.parametrize("mode", ["plain", "consistent"])
def test_modes_that_do_not_read_them_say_so(mode: str, model: StoryModel, first: list[Image.Image]) -> None:
    drawn = draw(STORY, model=model, mode=mode, initial_pictures=first, **FEW)
    assert any(
        "`initial_pictures` are read by iterative and reference mode" in said for said in drawn.notices
    )


def test_a_fixed_weight_is_the_same_in_every_round(model: StoryModel) -> None:
    runs = {}
    for name, scale in (("fixed", (0.3, 0.3)), ("linear", (0.3, 0.5))):
        events = list(generate(STORY, model=model, iterations=3, reference_scale=scale, **FEW))
        weights = [e.reference_scale for e in events if isinstance(e, RoundStarted)]
        runs[name] = {(e.round, e.frame): e.image.tobytes() for e in events if isinstance(e, FrameDrawn)}
        assert weights == pytest.approx([0, 0.3, 0.3, 0.3] if name == "fixed" else [0, 0.3, 0.4, 0.5])
    same = {key for key in runs["fixed"] if runs["fixed"][key] == runs["linear"][key]}
    assert same == {(k, i) for k in (0, 1) for i in range(3)}


def test_the_preset_of_the_ip_adapter_draws_every_frame_from_one_picture(
    model: StoryModel, first: list[Image.Image]
) -> None:
    how: dict[str, Any] = {"steps": 2, "model": model, "initial_pictures": first[0]}
    preset = draw(STORY, preset="ip-adapter", **how)
    said = {"scheduler": "ddim", "guidance_scale": 7.5, "noise": "shared", "reference_fit": "crop"}
    by_hand = draw(STORY, mode="reference", reference_scale=0.6, **said, **how)
    assert data(preset.images) == data(by_hand.images)
