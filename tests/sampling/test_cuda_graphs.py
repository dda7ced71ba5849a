"""A captured UNet call draws what the eager one draws. Needs a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastory import Story, StoryModel, generate
from fastory.events import FrameDrawn

CAPTIONS = [
    "a rabbit in the snow",
    "a fox",
    "a cat on the beach",
    "a bear is sleeping",
    "a fox in the forest",
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device"),
]


def pictures(graphs: str, dtype: str) -> np.ndarray:
    model = StoryModel.open("builtin", device="cuda", dtype=dtype, graphs=graphs)
    assert model.placement.graphs == (graphs == "auto")
    events = generate(Story.from_captions(CAPTIONS), model=model, steps=10, iterations=2, batch_size=2)
    return np.stack(
        [np.asarray(event.image, np.float64) for event in events if isinstance(event, FrameDrawn)]
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_captured_story_is_the_eager_one(dtype: str) -> None:
    """The same kernels on the same inputs: only the choice of an algorithm may differ, by some eps a step.

    Latents are of size 1 and 255 grey levels span 2 of the decoder's range; ten steps of eps each, tenfold for the
    decoder's gain.
    """
    eps = torch.finfo(getattr(torch, dtype)).eps
    difference = np.abs(pictures("auto", dtype) - pictures("off", dtype)).mean()
    assert difference <= max(1.0, 10 * 10 * eps * 127.5)


def test_captured_story_has_the_same_bytes_after_a_resume() -> None:
    assert (pictures("auto", "float16") == pictures("auto", "float16")).all()
