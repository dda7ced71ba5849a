"""Which frame sees what: policies over the last round, and pictures given for a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fastory import InputError, Story, StoryModel, generate
from fastory.events import FrameDrawn
from fastory.modes.iterative import frames_seen

STORY = """\
title: Two
characters:
  Ann: {prompt: a rabbit, references: [ann.png]%s}
  Bob: {prompt: a fox}
frames:
- Ann is sleeping
- Bob is jumping
- it is snowing
- Bob and Ann are standing
"""


def story(folder: Path, colour: str | None, more: str = "") -> Story:
    """The story with a picture of one colour for Ann, or with none."""
    text = STORY % more
    if colour is None:
        text = text.replace(", references: [ann.png]", "")
    else:
        Image.new("RGB", (48, 48), colour).save(folder / "ann.png")
    (folder / "story.yaml").write_text(text)
    return Story.read(folder / "story.yaml")


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def pictures(model: StoryModel, given: Story, **settings: object) -> dict[tuple[int, int], bytes]:
    chosen = {"steps": 2, "iterations": 1, "reference_scale": 0.5, "regions": "off", **settings}
    events = generate(given, model=model, **chosen)  # type: ignore[arg-type]
    return {
        (event.round, event.frame): event.image.tobytes() for event in events if isinstance(event, FrameDrawn)
    }


def furthest(one: bytes, other: bytes) -> int:
    """The largest difference of two pictures, in levels of 8 bits."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_each_policy_shows_the_frames_it_names(tmp_path: Path) -> None:
    given = story(tmp_path, None)
    seen = {
        policy: [[j for j in range(4) if frames_seen(given, policy)(i, j)] for i in range(4)]
        for policy in ("all", "others", "cast")
    }
    assert seen["all"] == [[0, 1, 2, 3]] * 4
    assert seen["others"] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    # 0 and 3 share Ann, 1 and 3 share Bob; 2 names nobody and sees what `others` sees
    assert seen["cast"] == [[3], [3], [0, 1, 3], [0, 1]]


def test_policies_draw_different_pictures(model: StoryModel, tmp_path: Path) -> None:
    given = story(tmp_path, None)
    drawn = {policy: pictures(model, given, references=policy) for policy in ("all", "others", "cast")}
    assert drawn["all"][0, 0] == drawn["others"][0, 0] == drawn["cast"][0, 0]
    assert len({drawn[policy][1, 0] for policy in drawn}) == 3


def test_a_characters_picture_reaches_its_frames_alone_and_from_round_1(
    model: StoryModel, tmp_path: Path
) -> None:
    red, blue = (pictures(model, story(tmp_path, colour)) for colour in ("red", "blue"))
    assert {key for key in red if red[key] != blue[key]} == {(1, 0), (1, 3)}


def test_reference_start_0_shows_it_in_round_0(model: StoryModel, tmp_path: Path) -> None:
    red, blue = (
        pictures(model, story(tmp_path, colour), reference_start=0, iterations=0)
        for colour in ("red", "blue")
    )
    assert {key for key in red if red[key] != blue[key]} == {(0, 0), (0, 3)}


def test_weight_of_a_characters_pictures_is_its_own(model: StoryModel, tmp_path: Path) -> None:
    none = pictures(model, story(tmp_path, None))
    silent = pictures(model, story(tmp_path, "red", ", scale: 0"))
    loud = pictures(model, story(tmp_path, "red", ", scale: 0.9"))
    rounds = pictures(model, story(tmp_path, "red"))
    same = pictures(model, story(tmp_path, "red", ", scale: 0.5"))
    # a silent group adds exact zeros, and keys that are masked: their number alone moves the last bit on some processors
    assert all(furthest(silent[key], none[key]) <= 1 for key in none)
    assert furthest(loud[1, 0], none[1, 0]) > 1
    assert rounds == same
    assert loud[1, 0] != rounds[1, 0] and loud[1, 1] == rounds[1, 1]


def test_pictures_that_no_round_shows_need_no_adapter(sd15_folder: Path, tmp_path: Path) -> None:
    model = StoryModel.open(str(sd15_folder))
    assert len(pictures(model, story(tmp_path, "red"), iterations=0)) == 4
    with pytest.raises(InputError, match="has no IP-Adapter"):
        pictures(model, story(tmp_path, "red"), iterations=0, reference_start=0)
