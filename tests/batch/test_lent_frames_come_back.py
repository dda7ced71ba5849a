"""Risk: of a story that several actors draw, frames are drawn twice or by nobody, or one frame ends actor after actor."""

from __future__ import annotations

import random

import pytest

from fastory.batch.ray_frames import ATTEMPTS, Shares
from fastory.errors import FastoryError
from fastory.modes.executor import Round


def round_of(frames: int, size: int = 2, missing: frozenset[int] | None = None) -> Round:
    return Round(1, size, frames, frozenset(range(frames)) if missing is None else missing)


@pytest.mark.parametrize("seed", range(20))
def test_every_micro_batch_is_drawn_by_one(seed: int) -> None:
    """Whoever asks, in whatever order, and whoever ends with what it has."""
    chance = random.Random(seed)
    shares = Shares(round_of(chance.randint(1, 40)), processes=chance.randint(2, 4))
    held, drawn, ends = [], [], 0
    here, todo = shares.here(), shares.left().missing
    for _ in range(5000):
        match chance.choice(("here", "lend", "arrive", "end")):
            case "here":
                batch = next(here, None)
                if batch is None:
                    here, todo = shares.here(), shares.left().missing
                for frame in todo.intersection(batch or ()):
                    drawn.append(frame)
                    shares.drawn(frame)
            case "lend" if lent := shares.lent(kept=0):
                held.append((lent, shares.left().missing.intersection(*[sum(lent, ())])))
            case "arrive" if held:
                batches, frames = held.pop(0)
                if frames:
                    drawn.append(min(frames))
                    shares.drawn(min(frames))
                    held.insert(0, (batches, frames - {min(frames)}))
            case "end" if held and ends < ATTEMPTS - 1:
                ends += 1
                shares.give_back(held.pop()[0])
    assert sorted(drawn) == list(range(shares.round.frames))
    assert not shares.left().missing


def test_what_is_lost_is_given_again_without_what_had_arrived() -> None:
    shares = Shares(round_of(20), processes=2)
    first, second, third = shares.lent(kept=1)
    assert (first, second, third) == ((0, 1), (2, 3), (4, 5))  # several at once while many wait
    for frame in (0, 1, 2):
        shares.drawn(frame)
    notice = shares.give_back([first, second, third])
    assert notice is not None and "frames 2-5 of round 1" in notice.message
    assert shares.lent(kept=1) == [(2, 3)]
    assert shares.left().missing == frozenset(range(3, 20))
    assert list(shares.here()) == [(4, 5)]
    assert shares.give_back([first]) is None


def test_one_micro_batch_is_kept_for_the_one_that_leads() -> None:
    shares = Shares(round_of(2), processes=3)
    assert shares.lent(kept=1) == [] and list(shares.here()) == [(0, 1)]


def test_a_micro_batch_that_ends_every_actor_ends_the_story() -> None:
    shares = Shares(round_of(4), processes=2)
    (batch,) = shares.lent(kept=1)
    for _ in range(ATTEMPTS - 1):
        assert shares.give_back([batch])
        assert shares.lent(kept=0) == [batch]
    with pytest.raises(FastoryError, match="frames 0-1 of round 1, 3 times"):
        shares.give_back([batch])
