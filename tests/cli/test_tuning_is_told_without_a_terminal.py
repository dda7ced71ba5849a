"""Risk: a tuning of hours in a log file prints nothing until it ends, or a line a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastory.cli import progress
from fastory.tuning import loop


def events(steps: int) -> Iterator[loop.Event]:
    yield from (loop.Encoded(done, 4) for done in range(1, 5))
    yield from (loop.Stepped(step, steps, 0.5 if step % 10 == 0 else None) for step in range(1, steps + 1))
    yield loop.Validated(steps, 0.25)
    yield loop.Tuned(Path("a.safetensors"), steps)


def told(capsys: pytest.CaptureFixture[str], quiet: bool = False) -> list[str]:
    progress.show_tuning(events(40), quiet)
    out, err = capsys.readouterr()
    assert out == "a.safetensors\n"
    return [line.strip() for line in err.splitlines()]


def test_a_line_at_the_start_and_at_the_end_of_what_takes_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys) == [
        "frames encoded: 1 of 4",
        "frames encoded: 4 of 4",
        "step 40 of 40: loss 0.5000",
        "step 40: validation loss 0.2500",
    ]


def test_a_line_for_every_loss_where_time_goes_by(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    assert [line for line in told(capsys) if line.startswith("step ")][:2] == [
        "step 10 of 40: loss 0.5000",
        "step 20 of 40: loss 0.5000",
    ]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, quiet=True) == []
