"""Risk: what one story left in a sampler's buffers reaches the next story's pictures, or a story drawn at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import pytest

from fastory import Story, StoryModel, generate
from fastory.events import Event, FrameDrawn
from fastory.sampling import sampler
from fastory.sampling.sampler import leave_idle, sampler_for
from fastory.settings import Settings

STORIES = {
    "two": ["a fox is sleeping in the snow", "a cat in the snow"],
    "others": ["a bear is jumping on the beach", "a rabbit in the forest"],
    "three": ["a fox", "a cat", "a bear on the beach"],
}
HOW: dict[str, dict[str, Any]] = {
    "iterative": {"iterations": 1, "regions": "off"},
    "causal": {"mode": "causal", "window": 1, "drafts": 0},
    "latest": {"iterations": 1, "references_from": "latest", "batch_size": 1},
    "noise": {"iterations": 0, "scheduler": "euler-ancestral", "noise": "per-frame"},
}

Pictures = dict[tuple[str, str], list[bytes]]


def events(model: StoryModel, name: str, how: str, steps: int = 1) -> Iterator[Event]:
    values: dict[str, Any] = {"steps": steps, "batch_size": 2, **HOW[how]}
    return generate(Story.from_captions(STORIES[name]), model=model, **values)


def pictures(found: Iterable[Event]) -> list[bytes]:
    return [event.image.tobytes() for event in found if isinstance(event, FrameDrawn)]


@pytest.fixture(scope="module")
def alone() -> Pictures:
    """What each story is with a model that has drawn nothing before."""
    names = [
        ("two", "iterative"),
        ("others", "iterative"),
        ("three", "latest"),
        ("two", "causal"),
        ("two", "noise"),
    ]
    return {(name, how): pictures(events(StoryModel.open(), name, how)) for name, how in names}


@pytest.mark.parametrize("kept", [1, 4])
def test_a_story_is_the_same_after_others(
    alone: Pictures, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kept: with one shape a sampler makes its buffers anew at every round."""
    monkeypatch.setattr(sampler, "KEPT_ROUNDS", kept)
    model = StoryModel.open()
    order = [*alone, *list(alone)[:2]]
    assert {key: alone[key] for key in order} == {key: pictures(events(model, *key)) for key in order}
    assert len(model.idle_samplers) == 1


def test_stories_drawn_at_the_same_time_have_a_sampler_each(alone: Pictures) -> None:
    model = StoryModel.open()
    pictures(events(model, "others", "iterative"))  # leaves a sampler that both would take
    both = [events(model, "two", "iterative"), events(model, "others", "iterative")]
    found: list[list[bytes]] = [[], []]
    for pair in zip_longest(*both):
        for own, event in zip(found, pair, strict=True):
            own.extend(pictures([event]))
    assert found == [alone["two", "iterative"], alone["others", "iterative"]]


def test_a_sampler_that_serves_the_next_story_is_taken_once() -> None:
    model, settings = StoryModel.open(), Settings(steps=2)
    first = sampler_for(model, settings, 2, 128, 128)
    leave_idle(first)
    assert sampler_for(model, Settings(steps=3, guidance_scale=2.0), 2, 128, 128) is first
    assert first.steps == 3 and first.settings.guidance_scale == 2.0
    assert sampler_for(model, settings, 2, 128, 128) is not first  # another story has it
    changes: list[dict[str, Any]] = [{"scheduler": "euler"}, {"guidance_scale": 1.0}]
    for changed in changes:
        leave_idle(first)
        assert sampler_for(model, Settings(**changed), 2, 128, 128) is not first
    for size in ((1, 128, 128), (2, 64, 128), (2, 128, 64)):
        leave_idle(first)
        assert sampler_for(model, settings, *size) is not first
    leave_idle(first)
    model.release()
    assert not model.idle_samplers
