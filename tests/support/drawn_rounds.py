"""Rounds of a small story, drawn by iterative mode itself."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastory import Story, StoryModel
from fastory.events import FrameDrawn
from fastory.modes.iterative import iterative
from fastory.modes.mode import StoryPlan
from fastory.settings import Settings

CAPTIONS = [
    "a rabbit in the snow",
    "a fox",
    "a cat on the beach",
    "a bear is sleeping",
    "a fox in the forest",
]


Pictures = dict[tuple[int, int], Image.Image]
# The schedule of Story-Adapter, for tests of the built-in model, which ships another one.
PAPERS = {"references_from": "last", "inner_steps": 0, "scheduler": "ddim", "reference_saturation": 1.0}


class Kept:
    """Pictures of an earlier run."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def has(self, round: int, frame: int) -> bool:
        return (round, frame) in self.pictures

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        return self.pictures[round, frame], None


def settings(**values: object) -> Settings:
    return Settings(**{"iterations": 2, "steps": 3, "noise": "per-frame", **values})  # type: ignore[arg-type]


def draw(
    model: StoryModel, captions: list[str], chosen: Settings, size: int, kept: Pictures | None = None
) -> Pictures:
    plan = StoryPlan(Story.from_captions(captions), chosen, finished=Kept(kept or {}))
    events = iterative(model, plan, batch_sizes=[size])
    return {(e.round, e.frame): e.image for e in events if isinstance(e, FrameDrawn)}


def noise(rounds: int) -> Pictures:
    """Pictures of three frames that show nothing."""
    rng = np.random.default_rng(5)
    places = [(k, i) for k in range(rounds) for i in range(3)]
    return {at: Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)) for at in places}
