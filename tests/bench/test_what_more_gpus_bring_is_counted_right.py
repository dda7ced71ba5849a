"""The model of bench/scale.py against cases that can be counted by hand."""

from __future__ import annotations

import pytest
from scale import Costs, stories_over_workers, story_over_ranks

FREE = {"load_seconds": 0.0, "finish_seconds": 0.0, "write_seconds": 0.0, "latency": 0.0, "slowest": 0.0,
        "picture_bytes": 0.0, "token_bytes": 0.0}  # fmt: skip


def costs(**values: float) -> Costs:
    return Costs(**{"frame_seconds": 1.0, "frames": 10, "rounds": 2, "batch": 2, **FREE, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpus", "seconds"),
    [(1, 20.0), (2, 12.0), (5, 4.0), (10, 2.0), (100, 2.0)],
    ids=lambda value: f"{value:g}",
)
def test_a_round_takes_as_long_as_its_fullest_rank(gpus: int, seconds: float) -> None:
    """5 micro-batches of 2 over 2 ranks: 3 and 2. Over 10 ranks: a frame each; more have nothing to do."""
    assert story_over_ranks(costs(), gpus).seconds == pytest.approx(seconds)


def test_what_binds_is_named() -> None:
    assert story_over_ranks(costs(), 1).binds == "the frames themselves"
    assert story_over_ranks(costs(write_seconds=5.0), 10).binds == "the writer"
    assert story_over_ranks(costs(write_seconds=5.0), 10).seconds == pytest.approx(2 * 10 * 5.0)
    assert story_over_ranks(costs(slowest=9.0), 10).binds == "the slowest rank"
    assert story_over_ranks(costs(token_bytes=1e9, link=1e9), 3).binds == "the exchange"
    assert story_over_ranks(costs(load_seconds=99.0), 10).binds == "loading and the storybook"
    assert stories_over_workers(costs(), 3, 100).binds == "uneven shares"
    assert stories_over_workers(costs(write_seconds=5.0), 100, 100).binds == "the writer"


def test_a_batch_is_as_long_as_its_longest_worker() -> None:
    assert stories_over_workers(costs(), 7, 3).seconds == pytest.approx(3 * 20.0)
    assert stories_over_workers(costs(slowest=0.5), 7, 3).seconds == pytest.approx(3.5 * 20.0)
    assert stories_over_workers(costs(write_seconds=1.0), 7, 7).seconds == pytest.approx(7 * 20 * 1.0)
