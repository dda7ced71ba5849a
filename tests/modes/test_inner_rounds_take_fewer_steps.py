"""Risk: rounds with fewer steps change the last one's, are drawn otherwise on a resume, or are told with wrong figures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from counted_calls import calls
from drawn_rounds import CAPTIONS, draw, settings
from PIL import Image
from run_folders import contents

from fastory import InputError, Story, StoryModel, generate
from fastory.events import FrameDrawn, StepDone, StoryStarted
from fastory.sampling.sampler import Sampler

SHORT = CAPTIONS[:3]


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


def test_unet_calls_are_those_of_each_round(model: StoryModel) -> None:
    """Two rounds of 2 steps and one of 5, three frames in micro-batches of two: the last one padded."""
    with calls({"unet": model.pipeline.unet}) as count:
        draw(model, SHORT, settings(iterations=2, steps=5, inner_steps=2), 2)
    assert count["unet"] == 2 * (2 + 2 + 5)


@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral", "dpm++", "unipc", "pndm"])
def test_the_last_round_is_drawn_as_without_it_from_the_same_references(
    model: StoryModel, scheduler: str
) -> None:
    """What a multi-step scheduler or a buffer keeps from a round of other steps must not reach this one."""
    given = {"iterations": 1, "steps": 5, "scheduler": scheduler}
    drawn = draw(model, SHORT, settings(**given, inner_steps=4), 2)
    first = {place: image for place, image in drawn.items() if place[0] == 0}
    alone = draw(model, SHORT, settings(**given), 2, first)
    for place, image in alone.items():
        assert image.tobytes() == drawn[place].tobytes()


def test_a_captured_call_serves_rounds_of_any_steps(model: StoryModel) -> None:
    sampler = Sampler(model, settings(steps=5), 1, 128, 128)
    buffers = sampler.model_input.data_ptr(), sampler.timestep.data_ptr(), sampler.latents.data_ptr()
    sampler.set_steps(2)
    assert len(sampler.host_timesteps) == len(sampler.timesteps) == 2
    assert (
        sampler.model_input.data_ptr(),
        sampler.timestep.data_ptr(),
        sampler.latents.data_ptr(),
    ) == buffers


def test_a_run_is_resumed_to_the_same_bytes_and_its_steps_are_told(model: StoryModel, tmp_path: Path) -> None:
    story = Story.from_captions(SHORT, title="fewer")
    given = {"model": model, "iterations": 2, "steps": 4, "inner_steps": 2, "batch_size": 2}
    events = list(generate(story, output=tmp_path / "whole", **given))
    steps = Counter(e.round for e in events if isinstance(e, StepDone) for _ in e.frames)
    assert steps == {0: 6, 1: 6, 2: 12}
    (started,) = (event for event in events if isinstance(event, StoryStarted))
    assert started.steps_left == sum(steps.values())
    # Ended in the middle of round 1, and taken up again.
    for event in generate(story, output=tmp_path / "cut", **given):
        if isinstance(event, FrameDrawn) and event.round == 1:
            break
    drawn = json.loads((tmp_path / "cut" / "manifest.json").read_text())["pictures"]
    assert len(drawn["0"]) == 3 and 0 < len(drawn["1"]) < 3  # a micro-batch is recorded as one
    again = list(generate(story, output=tmp_path / "cut", **given))
    (started,) = (event for event in again if isinstance(event, StoryStarted))
    assert started.steps_left == (3 - len(drawn["1"])) * 2 + 3 * 4
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    for round, name in ((2, "iteration-00"), (4, "iteration-02")):
        with Image.open(tmp_path / "whole" / name / "frame-000.png") as picture:
            assert f"Steps: {round}," in picture.text["parameters"]


def test_a_run_without_it_is_the_run_that_it_was(model: StoryModel, tmp_path: Path) -> None:
    """Folders of before have no inner_steps in their manifests; they are gone on with, and keep their default names."""
    story = Story.from_captions(SHORT, title="before")
    list(generate(story, model=model, output=tmp_path / "run", iterations=1, steps=2))
    assert "inner_steps" not in json.loads((tmp_path / "run" / "manifest.json").read_text())["settings"]
    with pytest.raises(InputError, match="inner_steps: None there, 1 here"):
        list(generate(story, model=model, output=tmp_path / "run", iterations=1, steps=2, inner_steps=1))


def test_where_there_is_one_round_it_is_said_to_decide_nothing(model: StoryModel) -> None:
    story = Story.from_captions(SHORT[:1])
    events = generate(story, model=model, iterations=0, steps=1, inner_steps=3)
    assert any("`inner_steps` is not used" in str(event) for event in events)
    with pytest.raises(InputError, match=r"inner_steps .*wanted 0 to 1000, got -1"):
        list(generate(story, model=model, iterations=1, inner_steps=-1))
