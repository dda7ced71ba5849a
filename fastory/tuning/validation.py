"""How far a tuning has come: the loss on stories that are not trained, and a story drawn as `fastory generate` draws it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fastory.events import FrameDrawn
from fastory.models.torch_model import StoryModel
from fastory.modes.causal import causal
from fastory.modes.mode import StoryPlan
from fastory.pictures import open_picture
from fastory.settings import resolve
from fastory.story import Story
from fastory.tuning.batches import Batches
from fastory.tuning.stories import Example
from fastory.tuning.training_module import TrainingModule

STEPS = 25  # of denoising
FRAMES = 8  # of the story, from its first on
LOSSES = 4  # batches of the loss; noise, stretches and windows are the same every time


class Validation:
    """Judges the weights as they are; the caller puts the averages in place."""

    def __init__(self, model: StoryModel, module: TrainingModule, held_out: Batches) -> None:
        self.model, self.module, self.held_out = model, module, held_out

    def show(self, writer: Any, step: int, example: Example, size: tuple[int, int]) -> float | None:
        """Write the loss and the pictures of `example`, the given ones above the drawn ones. Returns the loss."""
        loss = self.loss()
        if loss is not None:
            writer.add_scalar("validation loss", loss, step)
        pictures = [ImageOps.fit(open_picture(path), size) for path in example.pictures[:FRAMES]]
        drawn = draw(self.model, example.prompts[:FRAMES], size)
        sheet = np.concatenate([np.concatenate([np.asarray(p) for p in row], 1) for row in (pictures, drawn)])
        writer.add_image(f"story {example.name}", sheet, step, dataformats="HWC")
        return loss

    @torch.no_grad()
    def loss(self) -> float | None:
        """The mean loss over the same batches of the stories that are not trained, None where there are none."""
        if not self.held_out.stories:
            return None
        batches = (self.held_out.draw(n, 0) for n in range(LOSSES))
        return float(np.mean([float(self.module(batch.to(self.model.device))) for batch in batches]))


def draw(model: StoryModel, prompts: tuple[str, ...], size: tuple[int, int]) -> list[Image.Image]:
    """The story drawn in causal mode, with the widest window that the history has time embeddings for."""
    positions = model.require_history().encoder.config.positions
    wanted = {"mode": "causal", "steps": STEPS, "window": min(positions, len(prompts) - 1)}
    settings = replace(resolve(wanted, {}, None, model.defaults)[0], width=size[0], height=size[1])
    plan = StoryPlan(Story.from_captions(prompts), settings)
    events = causal(model, [plan], batch_sizes=[1], size=size)
    return [event.image for event in events if isinstance(event, FrameDrawn)]
