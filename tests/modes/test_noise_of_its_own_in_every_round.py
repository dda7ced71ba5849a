"""Risk: a round that should begin from another noise repeats the last one's, or begins from another after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawn_rounds import CAPTIONS, draw, settings
from ranks import run_alone_and_in_two
from run_folders import contents, drawn, end_and_resume, is_step, redraw_one

from fastory import Frame, Story, StoryModel, generate
from fastory.events import FrameDrawn, Notice

SHORT = CAPTIONS[:3]
STORY = Story.from_captions(SHORT, title="noise")
GIVEN = {"iterations": 2, "steps": 2, "batch_size": 2, "noise": "per-round"}
# Of no weight: what is left between two rounds of a frame is their noise.
ALONE = {"iterations": 2, "steps": 2, "reference_scale": (0.0, 0.0)}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


def test_rounds_begin_from_other_noise_and_round_0_from_the_frames(model: StoryModel) -> None:
    once = draw(model, SHORT, settings(**ALONE), 3)
    again = draw(model, SHORT, settings(**ALONE, noise="per-round"), 3)
    for i in range(3):
        assert len({once[k, i].tobytes() for k in range(3)}) == 1
        assert len({again[k, i].tobytes() for k in range(3)}) == 3
        assert again[0, i].tobytes() == once[0, i].tobytes()


def test_a_frames_own_seed_decides_its_noise_in_every_round(model: StoryModel) -> None:
    def seeds(run: int, own: int | None) -> dict[tuple[int, int], int]:
        frames = [Frame(SHORT[0], seed=own), Frame(SHORT[1])]
        story = Story(title="noise", frames=tuple(frames))
        events = list(generate(story, model=model, seed=run, **GIVEN))
        assert not any("noise" in event.message for event in events if isinstance(event, Notice))
        return {(e.round, e.frame): e.seed for e in events if isinstance(e, FrameDrawn)}

    first, other, free = seeds(1, 5), seeds(2, 5), seeds(1, None)
    assert len(set(first.values())) == len(first) == 6
    for k in range(3):
        assert first[k, 0] == other[k, 0] != free[k, 0] and first[k, 1] == free[k, 1] != other[k, 1]


def test_where_every_frame_has_a_seed_the_noise_is_still_read(model: StoryModel) -> None:
    story = Story(title="noise", frames=tuple(Frame(caption, seed=5) for caption in SHORT))
    for noise, unread in (("per-round", False), ("per-frame", True)):
        events = generate(story, model=model, **{**GIVEN, "noise": noise})
        said = [event.message for event in events if isinstance(event, Notice)]
        assert any("`noise` is not used" in line for line in said) == unread


def test_a_run_is_resumed_to_the_same_bytes(model: StoryModel, tmp_path: Path) -> None:
    given = {"model": model, **GIVEN}
    list(generate(STORY, output=tmp_path / "whole", **given))
    end_and_resume(STORY, tmp_path / "cut", is_step(2, (2,)), **given)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_redraw_seed_counts_in_every_round_and_the_same_is_nothing_to_redraw(
    model: StoryModel, tmp_path: Path
) -> None:
    given = {"model": model, **GIVEN, "references_from": "last"}
    again, changed = redraw_one(STORY, 1, tmp_path / "run", **given)
    assert again == {(k, 1) for k in range(3)} and changed == {1}
    events = list(generate(STORY, output=tmp_path / "run", frames=[1], redraw_seed=7, **given))
    assert not drawn(events)


def test_a_frame_that_stays_has_the_seed_of_the_round_it_is_from(model: StoryModel, tmp_path: Path) -> None:
    given = {"model": model, **GIVEN, "references_from": "last", "inner_steps": 0}
    given |= {"iterations": 4, "until": "converged", "tolerance": 2.0}
    events = list(generate(STORY, output=tmp_path / "run", **given))
    pictures = {(e.round, e.frame): e for e in events if isinstance(e, FrameDrawn)}
    stayed = [e for e in pictures.values() if e.converged is not None]
    assert stayed and all(e.seed == pictures[e.converged, e.frame].seed for e in stayed)
    # The same seed again draws the same bytes: there is nothing to redraw.
    list(generate(STORY, output=tmp_path / "run", frames=[1], redraw_seed=7, **given))
    assert not drawn(list(generate(STORY, output=tmp_path / "run", frames=[1], redraw_seed=7, **given)))


@pytest.mark.slow
def test_several_processes_begin_from_the_same_noise(tmp_path: Path) -> None:
    options = [
        *("--iterations=2", "--steps=2", "--noise=per-round"),
        *("--references-from=last", "--batch-size=1", "--quiet"),
    ]
    alone, together = (files for _, files in run_alone_and_in_two(SHORT, options, tmp_path))
    assert alone == together
