"""float16 and bfloat16 draw the float32 story, as far as their rounding allows; SDXL's VAE decodes in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastory import Story, StoryModel, generate
from fastory.events import FrameDrawn

STEPS = 3


def drawn(folder: Path, adapter: Path, dtype: str) -> np.ndarray:
    model = StoryModel.open(str(folder), ip_adapter=str(adapter), dtype=dtype)
    if dtype == "float16":
        assert (model.vae.dtype == torch.float32) == (model.family.name == "sdxl")
    events = generate(Story.from_captions(["a fox", "a cat"]), model=model, steps=STEPS, iterations=2)
    return np.stack(
        [np.asarray(event.image, np.float64) for event in events if isinstance(event, FrameDrawn)]
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_half_types(family: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """Tolerance of the mean: half a grey level of the 8-bit picture, and one eps of half the range (127.5) a step."""
    folder = request.getfixturevalue(f"{family}_folder")
    adapter = request.getfixturevalue(f"{family}_adapter_plus")
    difference = np.abs(drawn(folder, adapter, dtype) - drawn(folder, adapter, "float32")).mean()
    assert 0 < difference <= 0.5 + STEPS * torch.finfo(getattr(torch, dtype)).eps * 127.5
