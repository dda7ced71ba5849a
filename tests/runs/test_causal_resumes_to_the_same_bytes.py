"""Causal runs: bytes do not depend on interruptions, on the stories beside them, or on how a redraw came about."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_history import pictures, write_causal_folder
from small_history import tell as tell_causally

from fastory import Story, StoryModel
from fastory.events import BatchHalved, FrameDrawn, StepDone, StoryStarted
from fastory.modes import causal as mode

CAPTIONS = [
    "a red fox in the sea",
    "the rabbit sleeps",
    "a fox and a rabbit with fruit",
    "robinson swims",
    "the blue fox picks fruit",
    "a rabbit in the forest",
]
OTHER = ["the forest", "a fox sleeps in the forest", "the red rabbit swims"]
tell = partial(tell_causally, window=2, noise="per-frame")


@pytest.fixture(scope="module")
def model(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StoryModel:
    return StoryModel.open(str(write_causal_folder(sd15_folder, tmp_path_factory.mktemp("causal") / "model")))


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def whole(model: StoryModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    list(tell(model, Story.from_captions(CAPTIONS), folder))
    return on_disk(folder)


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_that_stops_after_any_frame_ends_in_the_same_bytes(
    model: StoryModel, whole: dict[str, bytes], tmp_path: Path, stop: int
) -> None:
    """The history is made again from the finished pictures: also where more came before than the window holds."""
    story = Story.from_captions(CAPTIONS)
    events, drawn = tell(model, story, tmp_path / "run"), 0
    for event in events:
        drawn += isinstance(event, FrameDrawn)
        if drawn == stop:
            break
    events.close()  # type: ignore[attr-defined]
    again = pictures(tell(model, story, tmp_path / "run"))
    assert sorted(again) == [(0, i) for i in range(stop, 6)]
    assert on_disk(tmp_path / "run") == whole


def test_stories_side_by_side_are_the_stories_alone(model: StoryModel) -> None:
    """Three stories of different lengths in batches of two: each as beside itself, in a batch of that size.

    Of another size it may be rounded otherwise: with AMX and AVX-512 products of matrices are, with AVX2 they were not.
    """
    stories = [
        Story.from_captions(captions, title=str(n))
        for n, captions in enumerate([CAPTIONS, OTHER, OTHER[::-1]])
    ]
    events = list(tell(model, stories))
    together = pictures(iter(events))
    steps = [e.story_index for e in events if isinstance(e, StepDone) and e.frames == (0,)]
    assert steps == [0, 1, 0, 1, 2, 2]  # two stories a step, then the third
    assert [e.story_index for e in events if isinstance(e, StoryStarted)] == [0, 1, 2]
    for place, story in enumerate(stories):
        itself = pictures(tell(model, [story] * 2))
        assert {frame: data for (at, frame), data in itself.items() if at == 0} == {
            frame: data for (at, frame), data in together.items() if at == place
        }


def test_a_redraw_from_a_frame_on_is_the_edited_story(
    model: StoryModel, whole: dict[str, bytes], tmp_path: Path
) -> None:
    list(tell(model, Story.from_captions(CAPTIONS), tmp_path / "run"))
    edited = Story.from_captions([*CAPTIONS[:3], "the rabbit picks fruit", *CAPTIONS[4:]])
    again = pictures(tell(model, edited, tmp_path / "run", frames=slice(3, None)))
    assert sorted(again) == [(0, 3), (0, 4), (0, 5)]
    fresh = pictures(tell(model, edited))
    assert all(fresh[key] == data for key, data in again.items())
    after = on_disk(tmp_path / "run")
    for i in range(6):
        name = f"iteration-00/frame-{i:03d}.png"
        assert (after[name] == whole[name]) == (i < 3)


def test_a_continuation_starts_from_the_given_picture(model: StoryModel, tmp_path: Path) -> None:
    given = tmp_path / "first.png"
    Image.effect_mandelbrot((90, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(given)
    story = Story.from_captions(CAPTIONS[:3])
    continued = pictures(tell(model, story, first_frame=given))
    plain = pictures(tell(model, story))
    assert sorted(continued) == [(0, 0), (0, 1), (0, 2)]
    size = Image.frombytes("RGB", (64, 64), continued[0, 0]).size
    assert size == (64, 64)
    assert all(continued[key] != plain[key] for key in plain)
    list(tell(model, story, tmp_path / "run", first_frame=given))
    (tmp_path / "run" / "iteration-00" / "frame-002.png").unlink()
    assert pictures(tell(model, story, tmp_path / "run", first_frame=given)) == {(0, 2): continued[0, 2]}
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["settings"]["window"] == 2


def test_when_memory_runs_out_a_frame_starts_again_with_fewer_stories(
    model: StoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator refuses two rows under guidance from frame 1 on; one story at a time fits. A resume keeps that."""
    stories = [Story.from_captions(captions, title=str(n)) for n, captions in enumerate([OTHER, OTHER[::-1]])]
    finish_frame = mode.finish_frame

    def short_of_memory(batch: Any, state: Any, frame: int, *rest: Any) -> FrameDrawn:
        assert batch.sampler is not None
        if frame == 1 and batch.sampler.batch_size == 2:
            torch.empty(2**60, dtype=torch.uint8)  # what the allocator says of itself
        return finish_frame(batch, state, frame, *rest)

    monkeypatch.setattr(mode, "finish_frame", short_of_memory)
    events = list(tell(model, stories, tmp_path))
    halved = [event for event in events if isinstance(event, BatchHalved)]
    assert [(event.frame, event.size) for event in halved] == [(1, 1)]
    drawn = [(e.story_index, e.frame) for e in events if isinstance(e, FrameDrawn)]
    assert drawn == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    for name in ("0", "1"):
        assert json.loads((tmp_path / name / "manifest.json").read_text())["batch_sizes"] == [2, 1]
    before = on_disk(tmp_path)
    (tmp_path / "1" / "iteration-00" / "frame-001.png").unlink()
    assert sorted(pictures(tell(model, stories, tmp_path))) == [(1, 1)]
    assert on_disk(tmp_path) == before
