"""The built-in model's causal weights must be found, change what later frames show, and leave iterative mode as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from small_history import forget_adapter
from typer.testing import CliRunner

from fastory import Story, StoryModel, generate
from fastory.builtin.training.remembering import POSITIONS
from fastory.cli import app
from fastory.events import FrameDrawn

CAPTIONS = [
    "A fox is standing in the house",
    "A fox is reading a book in the forest",
    "A fox is jumping on the beach",
]


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu", dtype="float32")


def drawn(model: StoryModel, captions: list[str], **settings: object) -> list[np.ndarray]:
    events = generate(Story.from_captions(captions), model=model, **settings)
    return [np.asarray(one.image) for one in events if isinstance(one, FrameDrawn)]


def test_the_history_holds_a_story_of_forty_frames(model: StoryModel) -> None:
    assert model.require_history().encoder.config.positions == POSITIONS == 39
    assert model.require_history().updates


def test_later_frames_see_earlier_ones(model: StoryModel) -> None:
    """The same frame after another beginning is another picture; the first frame does not change."""
    settings = {"mode": "causal", "steps": 2}
    told = drawn(model, CAPTIONS, **settings)
    other = drawn(model, ["A cat is sleeping in the snow", *CAPTIONS[1:]], **settings)
    again = drawn(model, CAPTIONS[:1], **settings)
    assert np.array_equal(told[0], again[0])
    assert all(np.abs(a.astype(int) - b).mean() > 1 for a, b in zip(told[1:], other[1:], strict=True))


def test_iterative_mode_does_not_see_the_updates(
    model: StoryModel, builtin_folder: Path, tmp_path: Path
) -> None:
    """The same bytes as a folder without causal weights, before and after a causal story with the same model."""
    plain = Path(shutil.copytree(builtin_folder, tmp_path / "plain", ignore=shutil.ignore_patterns("causal")))
    forget_adapter(plain)
    without = StoryModel.open(str(plain), device="cpu", dtype="float32")
    settings = {"steps": 2, "iterations": 1}
    expected = drawn(without, CAPTIONS[:2], **settings)
    drawn(model, CAPTIONS[:2], mode="causal", steps=1)
    got = drawn(model, CAPTIONS[:2], **settings)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_command_line_draws_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["generate", "flag", "--mode", "causal", "--steps", "1", "-o", str(tmp_path / "run"), "--quiet"]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "storybook.html").is_file()
