"""The unconditional row of causal mode: an empty caption, and a null frame wherever the conditional row has a frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_rounds import Kept
from PIL import Image
from small_history import FRAME_TOKENS, write_causal_folder

from fastory import Story, StoryModel
from fastory.conditioning.history import HistoryRow
from fastory.modes.causal import prepare_frame
from fastory.modes.mode import StoryPlan
from fastory.settings import Settings

WINDOW = 3


@pytest.fixture(scope="module")
def model(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StoryModel:
    return StoryModel.open(str(write_causal_folder(sd15_folder, tmp_path_factory.mktemp("causal") / "model")))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("before", [0, 1, 3, 5])
@torch.no_grad()
def test_null_frames_stand_where_frames_stand(model: StoryModel, before: int) -> None:
    story = Story.from_captions(
        ["a fox", "the red fox swims in the sea", "a rabbit", "the sea", "a fox", "forest"]
    )
    chosen = Settings(mode="causal", window=WINDOW, negative_prompt="blue")
    plan = StoryPlan(story, chosen, finished=Kept({(0, i): picture(i) for i in range(before)}))
    _, (row,) = prepare_frame(model, [plan], before, 1, (64, 64))
    assert isinstance(row.conditional, HistoryRow) and isinstance(row.unconditional, HistoryRow)
    kv, padding = row.unconditional.kv, row.unconditional.padding

    encoder, project = model.require_history().encoder, model.layers.project_text
    caption = model.encode_caption("blue").tokens + encoder.type_embeddings.weight[0]
    limit = caption.shape[1]
    assert torch.equal(kv[:, :limit], project(caption))
    visible = (~padding[0, :limit]).nonzero().flatten().tolist()
    words = len(model.pipeline.tokenizer("blue").input_ids)
    assert visible == list(range(words))

    null = model.encode_frame("", Image.new("RGB", (32, 32)))
    tokens = encoder(null.tokens, null.padding, WINDOW)
    taken = min(before, WINDOW)
    for place in range(WINDOW):
        part = slice(limit + place * FRAME_TOKENS, limit + (place + 1) * FRAME_TOKENS)
        if place >= taken:
            assert padding[:, part].all()
            continue
        position = encoder.type_embeddings.weight[1] + encoder.time_embeddings.weight[place]
        expected = project(tokens) + project(position[None, None])
        # the sum of two projections, rounded apart: a few units in the last place
        assert (kv[:, part] - expected).abs().max() < 16 * torch.finfo(
            torch.float32
        ).eps * expected.abs().max()
        assert torch.equal(padding[:, part], null.padding)
    assert not torch.equal(row.conditional.kv, kv)
