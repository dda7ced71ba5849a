"""Risk: what runs beside the next micro-batch's steps reads latents that these write, loses its order, or hides an error."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fastory import Story, StoryModel
from fastory.events import BatchHalved, Event, FrameDrawn, StepDone
from fastory.models.protocol import Decoded
from fastory.modes.iterative import iterative
from fastory.modes.mode import StoryPlan
from fastory.sampling import tail
from fastory.settings import Settings

CAPTIONS = ["a fox in the snow", "a cat", "a bear on the beach", "a rabbit"]
WAIT = 60  # seconds, after which what should have happened has not


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def draw(model: StoryModel, **values: Any) -> list[Event]:
    settings = Settings(**{"steps": 2, "iterations": 1, "regions": "off", "noise": "per-frame", **values})
    return list(iterative(model, StoryPlan(Story.from_captions(CAPTIONS), settings), batch_sizes=[2]))


def pictures(events: list[Event]) -> list[tuple[int, int, bytes]]:
    return [(e.round, e.frame, e.image.tobytes()) for e in events if isinstance(e, FrameDrawn)]


@pytest.fixture
def threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread as on a GPU; what it computes is the CPU's."""
    monkeypatch.setattr(tail, "beside", lambda device: ThreadPoolExecutor(1))


@pytest.mark.parametrize("references_from", ["last", "latest"])
def test_pictures_are_those_of_one_thread(
    model: StoryModel, monkeypatch: pytest.MonkeyPatch, references_from: str
) -> None:
    plain = pictures(draw(model, references_from=references_from))
    monkeypatch.setattr(tail, "beside", lambda device: ThreadPoolExecutor(1))
    assert pictures(draw(model, references_from=references_from)) == plain


@pytest.mark.usefixtures("threaded")
def test_the_next_micro_batch_begins_before_a_picture_is_decoded(
    model: StoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first picture cannot be decoded before the second micro-batch's first step is done, and is the same."""
    settings, found = Settings(steps=2, iterations=0, noise="per-frame"), list[Event]()
    plain = pictures(draw(model, iterations=0))
    begun, decode, steps = threading.Event(), model.decode, 0

    def late(latents: Tensor) -> Decoded:
        assert begun.wait(WAIT), "no step of the next micro-batch came"
        return decode(latents)

    monkeypatch.setattr(model, "decode", late)
    plan = StoryPlan(Story.from_captions(CAPTIONS), settings)
    for event in iterative(model, plan, batch_sizes=[2]):
        found.append(event)
        steps += isinstance(event, StepDone)
        if steps == 3:
            begun.set()
    first = next(n for n, event in enumerate(found) if isinstance(event, FrameDrawn))
    before = [isinstance(event, StepDone) for event in found[:first]]
    assert pictures(found) == plain and sum(before) >= 3


@pytest.mark.usefixtures("threaded")
def test_memory_that_runs_out_beside_the_steps_halves_the_micro_batch(
    model: StoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, decode, failed = pictures(draw(model, iterations=0)), model.decode, list[int]()

    def once(latents: Tensor) -> Decoded:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("out of memory")
        return decode(latents)

    monkeypatch.setattr(model, "decode", once)
    events = draw(model, iterations=0)
    assert [event.size for event in events if isinstance(event, BatchHalved)] == [1]
    assert [drawn[:2] for drawn in pictures(events)] == [drawn[:2] for drawn in plain]
