"""Frame after frame, with kept K and V, causal mode computes what one masked pass over the whole story computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small_history import FRAME_TOKENS, write_causal_folder
from torch import Tensor

from fastory import StoryModel
from fastory.checkpoints.history_encoder import HistoryEncoder
from fastory.conditioning.history import EncodedFrame, Ring, Window
from fastory.processors.projected import Layer

FRAMES, CAPTION = 6, 7
TOLERANCE = 1e-5  # float32, as the method asks for; the largest values are about 1


@pytest.fixture(scope="module")
def model(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StoryModel:
    return StoryModel.open(str(write_causal_folder(sd15_folder, tmp_path_factory.mktemp("causal") / "model")))


@pytest.fixture(scope="module")
def told(model: StoryModel) -> tuple[Tensor, Tensor]:
    """m (1, 6 * S, C_x) of six frames whose captions end after 3 to 12 tokens, and their padding."""
    torch.manual_seed(3)
    tokens = torch.randn(1, FRAMES * FRAME_TOKENS, model.cross_attention_dim)
    ends = torch.tensor([12, 3, 7, 12, 5, 9])
    padding = torch.arange(FRAME_TOKENS)[None] >= ends[:, None]
    return tokens, padding.view(1, -1)


def frames_of(tokens: Tensor, padding: Tensor) -> list[EncodedFrame]:
    pairs = zip(tokens.split(FRAME_TOKENS, 1), padding.split(FRAME_TOKENS, 1), strict=True)
    return [EncodedFrame(*pair) for pair in pairs]


def ring_of(model: StoryModel, window: int) -> Ring:
    encoder = model.require_history().encoder
    return Ring(encoder, model.layers.project_text, table_of(model), window)


def table_of(model: StoryModel) -> Tensor:
    encoder = model.require_history().encoder
    return model.layers.project_text(encoder.positions()[None])[0]


@torch.no_grad()
def by_definition(encoder: HistoryEncoder, tokens: Tensor, padding: Tensor, window: int) -> Tensor:
    """h in float64, the mask written out: group(i) - L_M < group(j) <= group(i), padded keys never."""
    groups = torch.arange(tokens.shape[1]) // FRAME_TOKENS
    allowed = (groups[None] <= groups[:, None]) & ~padding
    if window:
        allowed &= groups[None] > groups[:, None] - window
    local = encoder.local_attention.double()
    adapter = encoder.adapter.double()
    tokens = tokens.double()
    normed = local.norm(tokens)
    q, k, v = (to(normed).unflatten(-1, (local.heads, -1)) for to in (local.to_q, local.to_k, local.to_v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed, -torch.inf)
    seen = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
    out = tokens + local.to_out(seen)
    out = out + adapter.up(torch.nn.functional.gelu(adapter.down(out)))
    encoder.float()
    return out


@pytest.mark.parametrize("window", [1, 2, 4, 0])
def test_history_tokens_are_those_of_the_equation(
    model: StoryModel, told: tuple[Tensor, Tensor], window: int
) -> None:
    encoder = model.require_history().encoder
    exact = by_definition(encoder, *told, window)
    full = encoder(*told, window)
    assert (full - exact).abs().max() < TOLERANCE
    other = by_definition(encoder, *told, 3)  # the check can fail: another window is another result
    assert (other - exact).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("window", [1, 2, 4, 6])
def test_kept_keys_and_values_are_those_of_the_whole_story(
    model: StoryModel, told: tuple[Tensor, Tensor], window: int
) -> None:
    """After every frame the ring holds what a full pass gives for the last L_M frames, at their places in the window."""
    encoder, table, ring = model.require_history().encoder, table_of(model), ring_of(model, window)
    h = encoder(*told, window)
    for t, frame in enumerate(frames_of(*told)):
        ring.append(frame)
        kv, padding = ring.keys_values()
        first = max(0, t + 1 - window)
        for place, j in enumerate(range(first, t + 1)):
            part = slice(place * FRAME_TOKENS, (place + 1) * FRAME_TOKENS)
            whole = slice(j * FRAME_TOKENS, (j + 1) * FRAME_TOKENS)
            expected = model.layers.project_text(h[:, whole]) + table[place]
            assert (kv[:, part] - expected).abs().max() < TOLERANCE
            assert torch.equal(padding[:, part], told[1][:, whole])
        assert padding[:, (t + 1 - first) * FRAME_TOKENS :].all()


@dataclass
class WholeStory:
    """A context that holds every frame so far and masks in float64, as one full computation would."""

    kv: Tensor
    allowed: Tensor

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        keys, values = (part.double() for part in layer.keys_values(self.kv))
        scores = torch.einsum("bihd,bjhd->bhij", query.double(), keys) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~self.allowed, -torch.inf).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, values).to(query.dtype)


@pytest.mark.parametrize("window", [1, 2, 4, 6])
def test_unet_outputs_are_those_of_the_whole_story(
    model: StoryModel, told: tuple[Tensor, Tensor], window: int
) -> None:
    encoder, ring = model.require_history().encoder, ring_of(model, window)
    h, padding = encoder(*told, window), told[1]
    torch.manual_seed(4)
    caption = model.layers.project_text(torch.randn(1, CAPTION, model.cross_attention_dim))
    unseen = torch.tensor([[False] * 5 + [True] * 2])
    latents = torch.randn(1, 4, 8, 8)
    for t, frame in enumerate(frames_of(*told)):
        kv, hidden = ring.keys_values()
        context = Window(CAPTION, FRAME_TOKENS, window, kv).context(1)
        context.kv.copy_(torch.cat([caption, kv], 1))
        context.padding.copy_(torch.cat([unseen, hidden], 1))
        first = max(0, t - window)
        positions = encoder.positions()[torch.arange(FRAMES).sub(first).clamp(0)].repeat_interleave(
            FRAME_TOKENS, 0
        )
        past = slice(0, t * FRAME_TOKENS)
        groups = torch.arange(t * FRAME_TOKENS) // FRAME_TOKENS
        allowed = torch.cat([~unseen, ~padding[:, past] & (groups >= first)], 1)[0]
        everything = model.layers.project_text((h + positions)[:, past])
        whole = WholeStory(torch.cat([caption, everything], 1), allowed)
        got, expected = (
            model.unet(
                latents,
                torch.tensor(500),
                encoder_hidden_states=None,
                cross_attention_kwargs={"context": given},
                return_dict=False,
            )[0]
            for given in (context, whole)
        )
        assert (got - expected).abs().max() < TOLERANCE
        ring.append(frame)
