"""Captions alone: the baseline is what iterative mode calls round 0, and nothing of a story but its captions reaches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from drawn_rounds import CAPTIONS, PAPERS
from PIL import Image

from fastory import Character, Story, StoryModel, draw, generate
from fastory.events import FrameDrawn, Notice

FEW: dict[str, Any] = {"steps": 3, "noise": "per-frame"}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def test_plain_mode_draws_the_bytes_of_round_zero(model: StoryModel) -> None:
    events = generate(Story.from_captions(CAPTIONS[:3]), model=model, mode="plain", batch_size=2, **FEW)
    plain = [(e.round, e.frame, e.image.tobytes()) for e in events if isinstance(e, FrameDrawn)]
    how = {**FEW, **PAPERS, "iterations": 1, "regions": "off", "batch_size": 2}
    iterative = draw(CAPTIONS[:3], model=model, **how)
    assert plain == [(0, i, image.tobytes()) for i, image in enumerate(iterative.rounds[0])]
    # the check can fail: references change every picture
    assert plain[0][2] != iterative.images[0].tobytes()


def test_a_style_stands_in_every_caption(model: StoryModel) -> None:
    styled = draw(["fox"], model=model, mode="plain", style="a {prompt} in the snow", **FEW)
    said = draw(["a fox in the snow"], model=model, mode="plain", style="none", **FEW)
    assert styled.images[0].tobytes() == said.images[0].tobytes()


def test_settings_of_references_change_nothing(model: StoryModel) -> None:
    rabbit = Character("rabbit", references=[Image.new("RGB", (32, 32), "red")])
    story = Story.from_captions(CAPTIONS[:1], characters=[rabbit])
    notices: list[str] = []
    with_pictures = draw(
        story,
        model=model,
        mode="plain",
        iterations=3,
        inner_steps=1,
        reference_start=0,
        **FEW,
        callback=lambda event: notices.append(event.message) if isinstance(event, Notice) else None,
    )
    without = draw(CAPTIONS[:1], model=model, mode="plain", **FEW)
    assert with_pictures.images[0].tobytes() == without.images[0].tobytes()
    assert any("plain mode goes by captions alone" in notice for notice in notices)


def test_a_model_without_an_ip_adapter_draws(sd15_folder: Path) -> None:
    drawn = draw(["a fox"], model=StoryModel.open(str(sd15_folder)), mode="plain", steps=1)
    assert len(drawn.images) == 1
