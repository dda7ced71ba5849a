"""One frame, a hundred frames, captions that are too long, and memory that does not grow with the frames."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
from PIL import Image

from fastory import Story, StoryModel, generate
from fastory.events import FrameDrawn, Notice, StoryFinished

CAPTION = "a fox is sleeping in the snow"


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


@pytest.mark.parametrize("references", ["all", "others", "cast"])
def test_one_frame(references: str, model: StoryModel, tmp_path: Path) -> None:
    story = Story.from_captions([CAPTION])
    events = list(
        generate(story, model=model, output=tmp_path / "run", steps=2, iterations=2, references=references)
    )
    assert len([event for event in events if isinstance(event, FrameDrawn)]) == 3
    assert isinstance(events[-1], StoryFinished)


def test_one_frame_without_other_frames_is_drawn_as_in_round_0(model: StoryModel) -> None:
    story = Story.from_captions([CAPTION])
    drawn = [
        event.image.tobytes()
        for event in generate(
            story, model=model, steps=3, iterations=2, references="others", noise="per-frame"
        )
        if isinstance(event, FrameDrawn)
    ]
    assert drawn[0] == drawn[1] == drawn[2]


def test_hundred_frames(model: StoryModel, tmp_path: Path) -> None:
    story = Story.from_captions([CAPTION] * 100)
    events = list(generate(story, model=model, output=tmp_path / "run", steps=1, iterations=1))
    assert len([event for event in events if isinstance(event, FrameDrawn)]) == 200
    assert (tmp_path / "run" / "frames" / "frame-099.png").exists()
    with Image.open(tmp_path / "run" / "sheet.png") as sheet:
        assert max(sheet.size) <= 8192


def test_pictures_are_not_kept_in_memory(model: StoryModel, tmp_path: Path) -> None:
    """While a story of 40 frames is drawn, no more pictures are alive than one micro-batch holds."""
    alive: list[weakref.ref[Image.Image]] = []
    most = 0
    events = generate(
        Story.from_captions([CAPTION] * 40),
        model=model,
        output=tmp_path / "run",
        steps=1,
        iterations=2,
        batch_size=4,
    )
    for event in events:
        if isinstance(event, FrameDrawn):
            alive.append(weakref.ref(event.image))
            del event
            most = max(most, sum(reference() is not None for reference in alive))
    assert len(alive) == 120
    assert most <= 4


def test_caption_over_the_token_limit_is_cut_with_a_notice_that_quotes_the_loss(model: StoryModel) -> None:
    limit = model.pipeline.tokenizer.model_max_length
    long = " ".join([CAPTION] * limit) + " with a ball"
    story = Story.from_captions([CAPTION, long])
    notices = [
        e.message for e in generate(story, model=model, steps=1, iterations=0) if isinstance(e, Notice)
    ]
    lost = [message for message in notices if "longer than" in message]
    assert len(lost) == 1 and lost[0].startswith("frame 1:") and lost[0].rstrip("'").endswith("with a ball")
    # what is drawn is the caption as far as it was read
    kept = Story.from_captions([long.removesuffix(" with a ball")])
    drawn = [
        [
            e.image.tobytes()
            for e in generate(s, model=model, steps=1, iterations=0, noise="shared")
            if isinstance(e, FrameDrawn)
        ]
        for s in (story, kept)
    ]
    assert drawn[0][1] == drawn[1][0]


def test_unknown_word_is_a_notice_with_the_nearest_known_ones(model: StoryModel) -> None:
    story = Story.from_captions(["a rabit is sleeping in the snow"])
    notices = [
        e.message for e in generate(story, model=model, steps=1, iterations=0) if isinstance(e, Notice)
    ]
    assert any("1 word of this story: rabit (rabbit?)" in message for message in notices)
