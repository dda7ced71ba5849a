"""Drafts of frame 0: each is drawn from the one before alone, none stays in the history, and bytes do not depend on the way."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_history import pictures, write_causal_folder
from small_history import tell as tell_causally

from fastory import InputError, Story, StoryModel, generate
from fastory.events import BatchHalved, FrameDrawn, StepDone
from fastory.modes import causal as mode
from fastory.sampling.sampler import Sampler
from fastory.settings import Settings

CAPTIONS = ["a red fox in the sea", "the rabbit sleeps", "a fox and a rabbit with fruit"]
OTHER = ["the forest", "a fox sleeps in the forest", "the red rabbit swims"]
tell = partial(tell_causally, window=1, noise="shared")


@pytest.fixture(scope="module")
def model(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StoryModel:
    return StoryModel.open(str(write_causal_folder(sd15_folder, tmp_path_factory.mktemp("causal") / "model")))


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_frame_0_is_drawn_from_its_last_draft_alone(model: StoryModel, drafts: int, window: int) -> None:
    """As the last frame of a story that says the same over and over, from the same noise, seeing one frame back."""
    drawn = pictures(tell(model, Story.from_captions(CAPTIONS), drafts=drafts, window=window))
    over = pictures(tell(model, Story.from_captions(CAPTIONS[:1] * 3)))
    assert len({*over.values()}) == 3
    # Places that are empty add zeros to sums, which rounds otherwise: one step of 255 at most.
    apart = np.frombuffer(drawn[0, 0], np.uint8).astype(int) - np.frombuffer(over[0, drafts], np.uint8)
    assert abs(apart).max() <= (window > 1)
    other = np.frombuffer(over[0, drafts], np.uint8).astype(int) - np.frombuffer(
        over[0, (drafts - 1) % 3], np.uint8
    )
    assert abs(other).max() > 3


def test_later_frames_see_the_kept_frame_and_no_draft(model: StoryModel, tmp_path: Path) -> None:
    """A resume has only the finished pictures to go by."""
    story = Story.from_captions(CAPTIONS)
    options = {"drafts": 1, "window": 2}
    whole = pictures(tell(model, story, **options))
    events = tell(model, story, tmp_path / "run", **options)
    for event in events:
        if isinstance(event, FrameDrawn):
            break
    events.close()  # type: ignore[attr-defined]
    rest = pictures(tell(model, story, tmp_path / "run", **options))
    assert sorted(rest) == [(0, 1), (0, 2)]
    assert all(whole[key] == data for key, data in rest.items())
    with pytest.raises(InputError, match="drafts"):
        list(tell(model, story, tmp_path / "run", window=2, drafts=0))


def test_a_run_killed_in_a_draft_ends_in_the_same_bytes(model: StoryModel, tmp_path: Path) -> None:
    story = Story.from_captions(CAPTIONS)
    events = tell(model, story, tmp_path / "run", drafts=1)
    for event in events:
        if isinstance(event, StepDone) and not event.draft:
            break
    events.close()  # type: ignore[attr-defined]
    again = pictures(tell(model, story, tmp_path / "run", drafts=1))
    assert again == pictures(tell(model, story, drafts=1)) and len(again) == 3


def test_stories_side_by_side_have_their_own_drafts_and_a_given_frame_none(
    model: StoryModel, tmp_path: Path
) -> None:
    given = tmp_path / "first.png"
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(given)
    stories = [Story.from_captions(captions, title=str(n)) for n, captions in enumerate([CAPTIONS, OTHER])]
    stories.append(Story("given", stories[0].frames, first_frame=given))
    events = list(tell(model, stories, drafts=1, batch_size=3))
    together = pictures(iter(events))
    steps = [(e.story_index, e.draft) for e in events if isinstance(e, StepDone) and e.frames == (0,)]
    assert steps == [(0, 1), (1, 1)] * 2 + [(0, 0), (1, 0)] * 2
    for place, story in enumerate(stories):
        itself = pictures(tell(model, [story] * 3, drafts=1, batch_size=3))
        assert {frame: data for (at, frame), data in itself.items() if at == 0} == {
            frame: data for (at, frame), data in together.items() if at == place
        }
    plain = pictures(tell(model, [stories[2]] * 3, drafts=0, batch_size=3))
    assert {frame: data for (at, frame), data in together.items() if at == 2} == {
        frame: data for (at, frame), data in plain.items() if at == 0
    }


def test_when_memory_runs_out_behind_a_draft_the_draft_is_forgotten(
    model: StoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator refuses two stories at once when frame 0 itself is drawn: both begin again, one at a time."""
    stories = [Story.from_captions(captions, title=str(n)) for n, captions in enumerate([CAPTIONS, OTHER])]
    expected = pictures(tell(model, stories, drafts=1, batch_size=1))
    denoise = mode.denoise

    def short_of_memory(
        batch: Any, sampler: Sampler, members: Any, todo: Any, frame: int, draft: int = 0
    ) -> Any:
        if frame == 0 and draft == 0 and sampler.batch_size == 2:
            torch.empty(2**60, dtype=torch.uint8)  # what the allocator says of itself
        return (yield from denoise(batch, sampler, members, todo, frame, draft))

    monkeypatch.setattr(mode, "denoise", short_of_memory)
    events = list(tell(model, stories, drafts=1))
    assert [e.size for e in events if isinstance(e, BatchHalved)] == [1]
    assert pictures(iter(events)) == expected


def test_a_draft_costs_one_drawing_and_one_encoding_of_frame_0_alone(
    model: StoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode_frame = StoryModel.encode_frame

    def counted(self: StoryModel, prompt: str, image: Image.Image) -> Any:
        encoded.append(prompt)
        return encode_frame(self, prompt, image)

    monkeypatch.setattr(StoryModel, "encode_frame", counted)
    steps = {}
    for drafts in (0, 2):
        encoded.clear()
        events = list(tell(model, Story.from_captions(CAPTIONS), drafts=drafts))
        steps[drafts] = sum(isinstance(e, StepDone) for e in events)
        assert [p for p in encoded if p] == [CAPTIONS[0]] * (1 + drafts) + [
            CAPTIONS[1]
        ]  # nobody sees the last
    assert steps[2] == steps[0] + 2 * 2


def test_drafts_belong_to_causal_mode_and_are_whole_numbers() -> None:
    assert "drafts" not in Settings().identity()
    assert Settings(mode="causal").identity()["drafts"] == 0
    for value in (-1, 101, 0.5, True):
        with pytest.raises(InputError, match="drafts"):
            list(generate(Story.from_captions(["a fox"]), mode="causal", drafts=value))
