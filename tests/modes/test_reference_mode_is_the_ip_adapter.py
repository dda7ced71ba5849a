"""The bank is drawn from captions alone, and every later frame as diffusers' IP-Adapter draws it from the bank's pictures.

Tolerance: latents of both differ by some 1e-6 after 4 float32 steps (tests/processors/test_parity_with_diffusers.py), which
the decoder makes less than half of an 8-bit step of: a pixel may be rounded to its neighbour, never further.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from drawn_rounds import CAPTIONS
from PIL import Image

from fastory import InputError, Story, StoryModel, draw, generate
from fastory.events import FrameDrawn

SCALE, SEED = 0.7, 3
HOW: dict[str, Any] = {
    "mode": "reference",
    "reference_scale": SCALE,
    "scheduler": "ddim",
    "steps": 4,
    "guidance_scale": 5.0,
    "noise": "shared",
    "seed": SEED,
}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def with_ip_adapter(folder: Path, bank: list[Image.Image], caption: str, scale: float) -> Image.Image:
    """What diffusers' own pipeline draws with the built-in weights."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.load_ip_adapter(
        str(folder),
        subfolder="ip_adapter",
        weight_name="ip_adapter.safetensors",
        image_encoder_folder=str(folder / "image_encoder"),
    )
    pipeline.set_ip_adapter_scale(scale)
    images = pipeline(
        caption,
        ip_adapter_image=[bank],
        num_inference_steps=HOW["steps"],
        guidance_scale=HOW["guidance_scale"],
        generator=torch.Generator().manual_seed(SEED),
    ).images
    return images[0]


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


@pytest.mark.parametrize("bank", [1, 2])
def test_later_frames_are_those_of_the_stock_ip_adapter(
    bank: int, model: StoryModel, builtin_folder: Path
) -> None:
    drawn = draw(CAPTIONS[:4], model=model, bank=bank, batch_size=2, **HOW).images
    expected = with_ip_adapter(builtin_folder, drawn[:bank], CAPTIONS[3], SCALE)
    assert difference(drawn[3], expected) <= 1
    # the check can fail: another weight, and one picture more or less, are far from it
    assert difference(drawn[3], with_ip_adapter(builtin_folder, drawn[:bank], CAPTIONS[3], 0.5)) > 10
    assert difference(drawn[3], with_ip_adapter(builtin_folder, drawn[: 3 - bank], CAPTIONS[3], SCALE)) > 3


def test_the_bank_is_drawn_from_captions_alone_and_every_frame_once(model: StoryModel) -> None:
    plain = draw(CAPTIONS[:2], model=model, **{**HOW, "mode": "plain"}).images
    events = generate(Story.from_captions(CAPTIONS), model=model, bank=2, batch_size=2, **HOW)
    pictures = [(e.round, e.frame, e.image.tobytes()) for e in events if isinstance(e, FrameDrawn)]
    assert [(k, i) for k, i, _ in pictures] == [(0, i) for i in range(len(CAPTIONS))]
    assert [picture for _, _, picture in pictures[:2]] == [image.tobytes() for image in plain]


def test_a_frame_does_not_depend_on_how_many_are_drawn_at_once(model: StoryModel) -> None:
    three, two = (draw(CAPTIONS, model=model, batch_size=size, **HOW).images for size in (3, 2))
    assert max(difference(a, b) for a, b in zip(three, two, strict=True)) <= 1


def test_a_bank_of_all_frames_is_plain_mode_and_says_so(model: StoryModel) -> None:
    drawn = draw(CAPTIONS[:2], model=model, bank=5, **HOW)
    plain = draw(CAPTIONS[:2], model=model, **{**HOW, "mode": "plain"})
    assert [image.tobytes() for image in drawn.images] == [image.tobytes() for image in plain.images]
    assert any("the bank of 5 holds every frame" in notice for notice in drawn.notices)


def test_a_model_without_an_ip_adapter_is_refused_before_anything_is_drawn(sd15_folder: Path) -> None:
    with pytest.raises(InputError, match="no IP-Adapter"):
        generate(["a fox", "a cat"], model=StoryModel.open(str(sd15_folder)), mode="reference", steps=1)
