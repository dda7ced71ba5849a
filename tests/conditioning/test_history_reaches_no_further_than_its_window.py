"""Which frames can change frame t: the mask of causal mode as a table (Causal-Story, eq. 3; algorithms.md, section 2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_history import FRAME_TOKENS, write_causal_folder
from torch import Tensor

from fastory import StoryModel
from fastory.conditioning.history import EncodedFrame, Ring, Window

FRAMES = 6


@pytest.fixture(scope="module")
def models(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, StoryModel]:
    """With and without local causal attention between history tokens."""
    folder = tmp_path_factory.mktemp("causal")
    return {
        local: StoryModel.open(str(write_causal_folder(sd15_folder, folder / str(local), 4 if local else 0)))
        for local in (True, False)
    }


def tokens_of(frame: int, width: int) -> Tensor:
    return torch.randn(1, FRAME_TOKENS, width, generator=torch.Generator().manual_seed(frame))


def seen_by(model: StoryModel, window: int, frame: int, changed: int | None, place: int = 0) -> Tensor:
    """What the pixels of `frame` attend to in the first layer, where token `place` of frame `changed` is another one."""
    encoder = model.require_history().encoder
    table = model.layers.project_text(encoder.positions()[None])[0]
    ring = Ring(encoder, model.layers.project_text, table, window)
    padding = torch.zeros(1, FRAME_TOKENS, dtype=torch.bool)
    padding[:, -3:] = True
    for i in range(frame):
        tokens = tokens_of(i, encoder.config.width)
        if i == changed:
            tokens[:, place] += 1
        ring.append(EncodedFrame(tokens, padding))
    caption = model.layers.project_text(tokens_of(99, encoder.config.width)[:, :5])
    kv, hidden = ring.keys_values()
    context = Window(5, FRAME_TOKENS, window, table).context(1)
    context.kv.copy_(torch.cat([caption, kv], 1))
    context.padding.copy_(torch.cat([torch.zeros(1, 5, dtype=torch.bool), hidden], 1))
    layer = model.layers.layers[0]
    query = torch.randn(
        1,
        16,
        layer.attn.heads,
        layer.channels // layer.attn.heads,
        generator=torch.Generator().manual_seed(7),
    )
    return context.attend(layer, query)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_frame_sees_the_window_and_what_the_window_has_seen(
    models: dict[bool, StoryModel], window: int, local: bool
) -> None:
    """t-L .. t-1 directly; through the module between history tokens 2 L - 1 frames back; nothing older, nothing later."""
    model, reach = models[local], 2 * window - 1 if local else window
    table = [
        [
            not torch.equal(seen_by(model, window, t, j), seen_by(model, window, t, None))
            for j in range(FRAMES)
        ]
        for t in range(FRAMES)
    ]
    assert table == [[t - reach <= j <= t - 1 for j in range(FRAMES)] for t in range(FRAMES)]


def test_padded_caption_tokens_of_a_frame_are_never_seen(models: dict[bool, StoryModel]) -> None:
    for local, model in models.items():
        plain = seen_by(model, 2, 4, None)
        changes = [not torch.equal(seen_by(model, 2, 4, 3, place), plain) for place in range(FRAME_TOKENS)]
        assert changes == [True] * (FRAME_TOKENS - 3) + [False] * 3, local


def test_the_first_frame_sees_its_caption_alone(models: dict[bool, StoryModel]) -> None:
    """An empty window of any length is the caption's cross-attention and nothing else."""
    model = models[True]
    one, three = (seen_by(model, window, 0, None) for window in (1, 3))
    assert torch.equal(one, three)
    width = model.require_history().encoder.config.width
    layer = model.layers.layers[0]
    keys, values = layer.keys_values(model.layers.project_text(tokens_of(99, width)[:, :5]))
    query = torch.randn(
        1,
        16,
        layer.attn.heads,
        layer.channels // layer.attn.heads,
        generator=torch.Generator().manual_seed(7),
    )
    alone = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (query, keys, values))
    ).transpose(1, 2)
    # float32 rounding of a softmax over 5 keys: a few units in the last place of the largest value
    assert (one - alone).abs().max() < 32 * torch.finfo(torch.float32).eps * values.abs().max()
