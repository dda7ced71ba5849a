"""The drawn world's training stories are whole, the same for a seed, and say nothing that a caption must not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastory.builtin.captions import words
from fastory.builtin.drawn_stories import main
from fastory.builtin.world import COLOURS, HATS, SCARVES, SIZE
from fastory.tuning.stories import digest_of, read_examples


def test_stories_are_read_as_they_were_written(tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        main([str(tmp_path / name), "--stories", "3", "--frames", "5", "--seed", seed])
    first, again, other = (read_examples(tmp_path / name, (SIZE, SIZE)) for name in "abc")
    assert [len(example.pictures) for example in first] == [5, 5, 5]
    assert digest_of(first) == digest_of(again) != digest_of(other)
    said = {word for example in first for prompt in example.prompts for word in words(prompt)}
    assert not said & {*COLOURS, *HATS, *SCARVES, "hat", "scarf"}


def test_stories_too_short_or_too_long_are_refused(tmp_path: Path) -> None:
    for frames in ("3", "41"):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "new"), "--frames", frames])
    assert not list(tmp_path.iterdir())
