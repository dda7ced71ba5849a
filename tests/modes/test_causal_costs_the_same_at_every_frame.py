"""What a frame of a causal story costs is counted: encodes, projections and bytes, whatever came before it."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest
from counted_calls import calls
from small_history import write_causal_folder

from fastory import Story, StoryModel
from fastory.conditioning.history import Ring
from fastory.events import FrameDrawn
from fastory.modes.causal import causal
from fastory.modes.mode import StoryPlan
from fastory.settings import Settings

WORDS = ["fox", "rabbit", "robinson", "sea", "forest"]
FRAMES = 9


@pytest.fixture(scope="module")
def model(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StoryModel:
    return StoryModel.open(str(write_causal_folder(sd15_folder, tmp_path_factory.mktemp("causal") / "model")))


def test_a_frame_is_encoded_once_and_projected_once_and_the_history_does_not_grow(model: StoryModel) -> None:
    history = model.require_history().encoder
    first = model.layers.layers[0].attn
    modules = {
        "picture": history.vision,
        "caption": model.pipeline.text_encoder,
        "to_k": first.to_k,
        "to_v": first.to_v,
        "local": history.local_attention,
    }
    story = Story.from_captions([f"a {WORDS[i % 5]} in the {WORDS[-(i % 2)]}" for i in range(FRAMES)])
    plan = StoryPlan(story, Settings(mode="causal", window=3, steps=1))
    each: list[Counter[str]] = []
    held: list[int] = []
    with calls(modules) as count:
        for event in causal(model, [plan], batch_sizes=[1], size=(64, 64)):
            if isinstance(event, FrameDrawn):
                each.append(count.copy())
                held.append(max(found.bytes for found in gc.get_objects() if isinstance(found, Ring)))
                count.clear()
    # once a story: the null frame, the positions' table and the negative prompt
    assert each[0] == Counter(picture=2, caption=2, to_k=5, to_v=5, local=2)
    steady = Counter(picture=1, caption=1, to_k=2, to_v=2, local=1)  # a frame's caption and its history
    assert each[1:-1] == [steady] * (FRAMES - 2)
    assert each[-1] == Counter(caption=1, to_k=1, to_v=1)  # nobody looks back at the last frame
    assert held[2:-1] == [held[2]] * (FRAMES - 3)
