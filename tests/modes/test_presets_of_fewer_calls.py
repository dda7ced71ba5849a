"""Risk: a schedule in proportion to a model's steps is taken as it stands, or memory decides what a frame sees."""

from __future__ import annotations

import pytest

from fastory import Story, StoryModel
from fastory.presets import PRESETS
from fastory.runs.resolve import resolve_story
from fastory.runs.story_run import begin_runs
from fastory.settings import LATEST_AT_ONCE, resolve


@pytest.fixture(scope="module")
def builtin_model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


def calls(preset: str, defaults: dict[str, int]) -> int:
    """UNet calls a frame."""
    settings = resolve({}, {}, preset, defaults)[0]
    return sum(settings.steps_of(k) for k in range(settings.iterations + 1))


@pytest.mark.parametrize("steps", [15, 25, 50])
def test_quick_takes_a_sixth_of_the_calls_and_best_a_third(steps: int) -> None:
    papers = 11 * steps
    assert papers / 9 <= calls("quick", {"steps": steps}) <= papers / 6
    assert papers / 4 <= calls("best", {"steps": steps}) <= papers / 3


def test_the_bundled_model_is_drawn_as_quick_says(builtin_model: StoryModel) -> None:
    shipped, quick = (resolve({}, {}, preset, builtin_model.defaults)[0] for preset in (None, "quick"))
    assert shipped == quick


def test_the_schedule_of_paper_is_not_changed_by_a_models_steps(builtin_model: StoryModel) -> None:
    settings = resolve({}, {}, "paper", builtin_model.defaults)[0]
    assert all(getattr(settings, name) == value for name, value in PRESETS["paper"].items())


@pytest.mark.parametrize("processes", [1, 3, 8])
def test_how_many_processes_there_are_does_not_decide_what_a_frame_sees(
    builtin_model: StoryModel, processes: int
) -> None:
    story = Story.from_captions(["A fox is reading in the forest."] * 8, title="walk")
    resolved = resolve_story(builtin_model, story, {"references_from": "latest"})
    (run,) = begin_runs([(resolved, None)], None, processes)
    assert run.sizes == (LATEST_AT_ONCE,)


def test_fewer_steps_are_not_more_in_the_rounds_before_the_last(builtin_model: StoryModel) -> None:
    few = resolve({"steps": 2}, {}, None, builtin_model.defaults)[0]
    assert {few.steps_of(k) for k in range(few.iterations + 1)} == {2}
    asked = resolve({"steps": 2, "inner_steps": 3}, {}, None, builtin_model.defaults)[0]
    assert asked.steps_of(0) == 3  # where both are the user's
