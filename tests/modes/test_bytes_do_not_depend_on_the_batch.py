"""A frame is a pure function of model, caption, context and seed: bit for bit, on the CPU, for one micro-batch size."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawn_rounds import CAPTIONS, draw, settings
from PIL import Image

from fastory import Story, StoryModel
from fastory.events import FrameDrawn, StepDone
from fastory.modes.iterative import iterative
from fastory.modes.mode import StoryPlan


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.tobytes() == b.tobytes()


@pytest.fixture(params=["sd15", "sdxl"])
def model(request: pytest.FixtureRequest) -> StoryModel:
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    adapter: Path = request.getfixturevalue(f"{request.param}_adapter_plus")
    return StoryModel.open(str(folder), ip_adapter=str(adapter))


@pytest.mark.parametrize("references", ["all", "others"])
def test_resume_gives_the_bytes_of_an_uninterrupted_run(model: StoryModel, references: str) -> None:
    chosen = settings(references=references)
    whole = draw(model, CAPTIONS, chosen, 3)
    assert len(whole) == 15
    # left over: other places in the micro-batch, other neighbours, a padded micro-batch, and a whole round to load
    missing = {(0, 4), (1, 1), (1, 3), (1, 4), (2, 0), (2, 2)}
    rest = draw(model, CAPTIONS, chosen, 3, {key: whole[key] for key in whole if key not in missing})
    assert rest.keys() == missing
    assert all(same(rest[key], whole[key]) for key in missing)
    assert not same(whole[1, 1], whole[0, 1])


def test_frame_does_not_depend_on_its_neighbours_or_its_place(model: StoryModel) -> None:
    """Round 0 with shared noise: the caption alone decides, wherever the frame stands and whatever stands beside it."""
    chosen = settings(iterations=0, noise="shared")
    first = draw(model, CAPTIONS, chosen, 3)
    second = draw(
        model, ["a penguin", CAPTIONS[4], "a turtle", "a red fox", CAPTIONS[0], CAPTIONS[2]], chosen, 3
    )
    assert same(first[0, 4], second[0, 1])
    assert same(first[0, 0], second[0, 4])
    assert same(first[0, 2], second[0, 5])
    assert not same(first[0, 0], first[0, 1])


def test_short_story_is_padded_to_the_micro_batch(model: StoryModel) -> None:
    """One frame in a micro-batch of three is drawn as it is beside others."""
    chosen = settings(iterations=0)
    assert same(draw(model, CAPTIONS[:1], chosen, 3)[0, 0], draw(model, CAPTIONS, chosen, 3)[0, 0])


def test_stochastic_scheduler_draws_from_each_frames_own_generator(sd15_folder: Path) -> None:
    model = StoryModel.open(str(sd15_folder))
    chosen = settings(iterations=0, scheduler="euler-ancestral")
    whole = draw(model, CAPTIONS, chosen, 2)
    rest = draw(model, CAPTIONS, chosen, 2, {key: whole[key] for key in whole if key[1] not in (1, 4)})
    assert same(rest[0, 1], whole[0, 1]) and same(rest[0, 4], whole[0, 4])


def test_a_frames_seed_decides_its_noise(sd15_folder: Path) -> None:
    model = StoryModel.open(str(sd15_folder))
    story = Story.from_captions(CAPTIONS[:1] * 2)
    drawn = [
        {
            e.frame: e.image
            for e in iterative(model, StoryPlan(story, chosen, seeds=seeds), batch_sizes=[2])
            if isinstance(e, FrameDrawn)
        }
        for chosen, seeds in [
            (settings(iterations=0, noise="shared", seed=1), {}),
            (settings(iterations=0, noise="shared", seed=2), {0: 1}),
            (settings(iterations=0, noise="per-frame", seed=1), {}),
        ]
    ]
    assert same(drawn[0][0], drawn[0][1])  # shared: one noise for all
    assert same(drawn[1][0], drawn[0][0]) and not same(
        drawn[1][1], drawn[0][1]
    )  # --redraw-seed, for frame 0 alone
    assert not same(drawn[2][0], drawn[2][1])


def test_a_step_is_reported_for_every_frame_of_the_micro_batch(sd15_folder: Path) -> None:
    events = list(
        iterative(
            StoryModel.open(str(sd15_folder)),
            StoryPlan(Story.from_captions(CAPTIONS), settings(iterations=0)),
            batch_sizes=[2],
        )
    )
    steps = [(event.frames, event.step) for event in events if isinstance(event, StepDone)]
    assert steps == [(frames, step) for frames in [(0, 1), (2, 3), (4,)] for step in (1, 2, 3)]
