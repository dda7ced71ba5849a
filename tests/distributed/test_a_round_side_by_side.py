"""Risk: memory runs out in one process while others draw, and the round ends before they have, or more is given out in vain."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest

from fastory.distributed.side_by_side import draw_side_by_side
from fastory.events import Event, Notice


class Parts:
    """A round of parts, of which one other process draws every second; `fails` runs out of memory."""

    def __init__(self, count: int, fails: str = "") -> None:
        self.waiting, self.fails = deque(map(str, range(count))), fails
        self.elsewhere: list[str] = []
        self.turns = 0

    @property
    def is_drawn_elsewhere(self) -> bool:
        return bool(self.elsewhere)

    def lend(self) -> None:
        if self.waiting and not self.elsewhere:
            self.elsewhere.append(self.waiting.popleft())
            self.turns = 0

    def take(self) -> Iterator[Event] | None:
        return self._drawn(self.waiting.popleft()) if self.waiting else None

    def _drawn(self, part: str) -> Iterator[Event]:
        if part == self.fails:
            raise MemoryError(part)
        yield Notice(part)

    def heard(self, *, waiting: bool) -> Iterator[Event]:
        self.turns += 1
        if self.turns == 2:  # slower than this process
            part = self.elsewhere.pop()
            yield from self._drawn(part)


def test_every_part_is_drawn_once() -> None:
    said = [event.message for event in draw_side_by_side(Parts(7)) if isinstance(event, Notice)]
    assert sorted(said) == list("0123456")


@pytest.mark.parametrize("fails", ["0", "1"], ids=["elsewhere", "here"])
def test_where_memory_runs_out_all_have_ended_and_no_more_is_given_out(fails: str) -> None:
    parts = Parts(7, fails)
    events = draw_side_by_side(parts)
    with pytest.raises(MemoryError, match=fails):
        list(events)
    assert not parts.elsewhere, "another process draws still"
    assert len(parts.waiting) >= 4, "more was given out in vain"
