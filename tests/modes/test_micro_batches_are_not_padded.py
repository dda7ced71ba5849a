"""Risk: rows that nobody keeps are denoised, or micro-batches become so small that the device idles."""

from __future__ import annotations

import pytest

from fastory import Story, StoryModel, generate
from fastory.events import BatchChosen, StepDone
from fastory.runtime import fewest_rows


@pytest.mark.parametrize(
    ("count", "most", "size"),
    [
        (100, 16, 10),
        (5, 4, 3),
        (7, 4, 4),
        (8, 4, 4),
        (17, 16, 9),
        (13, 13, 13),
        (1, 1, 1),
        (2, 2, 2),
        (97, 16, 14),
    ],
)
def test_the_size_is_the_one_that_computes_the_fewest_rows(count: int, most: int, size: int) -> None:
    assert fewest_rows(count, most) == size


@pytest.mark.parametrize("most", range(1, 17))
def test_no_size_in_reach_computes_fewer_rows(most: int) -> None:
    for count in range(most, 130):
        size = fewest_rows(count, most)
        rows = -(-count // size) * size
        assert most // 2 <= size <= most and size >= 1
        assert all(rows <= -(-count // other) * other for other in range(max(1, (most + 1) // 2), most + 1))
        # Of equal ones the largest.
        assert all(-(-count // other) * other > rows for other in range(size + 1, most + 1))


def test_a_story_of_five_is_drawn_as_three_and_two() -> None:
    model = StoryModel.open("builtin", device="cpu")
    rows: list[int] = []
    model.pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["sample"])), with_kwargs=True
    )
    story = Story.from_captions(
        [f"a {animal} is sleeping" for animal in ("fox", "cat", "bear", "rabbit", "turtle")]
    )
    events = list(generate(story, model=model, iterations=0, steps=1, guidance_scale=1.0))
    assert next(event.size for event in events if isinstance(event, BatchChosen)) == 3
    assert rows == [3, 3]
    assert [event.frames for event in events if isinstance(event, StepDone)] == [(0, 1, 2), (3, 4)]
