"""Consistent Self-Attention against its equations, and a whole story against diffusers' pipeline with them in its place.

StoryDiffusion (arXiv 2405.01434), section 3.1: S_i = RandSample(tokens of the other frames), P_i = [I_i ; S_i],
O_i = Attention(Q_i, K_Pi, V_Pi). Here P_i is joined first and projected then, as the equations say; the mode projects once and
takes K and V of the sampled tokens where they stand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counted_calls import calls
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from drawn_rounds import CAPTIONS
from PIL import Image

from fastory import Story, StoryModel, draw, generate
from fastory.conditioning.consistent import sample
from fastory.events import FrameDrawn
from fastory.processors.consistent import Samples, consistent_self_attention

SEED = 5
HOW: dict[str, Any] = {
    "mode": "consistent",
    "scheduler": "ddim",
    "steps": 3,
    "guidance_scale": 5.0,
    "noise": "shared",
    "seed": SEED,
}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def by_the_equations(
    hidden: np.ndarray, weights: dict[str, np.ndarray], heads: int, seen: list[list[int]]
) -> np.ndarray:
    """hidden (F, L, C) in float64, seen: of every frame, indices into all F * L tokens -> (F, L, C) before to_out."""
    everything, outputs = hidden.reshape(-1, hidden.shape[2]), []
    for own, indices in zip(hidden, seen, strict=True):
        paired = np.concatenate([own, everything[indices]])
        parts = []
        for q, k, v in zip(
            *(
                np.split(tokens @ weights[name].T, heads, axis=1)
                for name, tokens in (("q", own), ("k", paired), ("v", paired))
            ),
            strict=True,
        ):
            scores = q @ k.T / np.sqrt(q.shape[1])
            shares = np.exp(scores - scores.max(1, keepdims=True))
            parts.append(shares / shares.sum(1, keepdims=True) @ v)
        outputs.append(np.concatenate(parts, axis=1))
    return np.stack(outputs)


@pytest.mark.parametrize(("bank", "later"), [(1, 1), (3, 0), (3, 2)], ids=["B1-1", "B3-0", "B3-2"])
@pytest.mark.parametrize("halves", [1, 2])
def test_the_operator_is_the_papers_equations_in_float64(bank: int, later: int, halves: int) -> None:
    """Tolerance: 12 float32 roundings of values below 4 (eps 1.2e-7, sums over 16 channels and 63 keys) are below 1e-5."""
    frames, tokens, heads, width = bank + later, 21, 2, 16
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((halves, frames, tokens, width))
    weights = {name: rng.standard_normal((width, width)) / 4 for name in "qkv"}
    rows = [sample((i, SEED), i if i < bank else None, bank, tokens, 0.5, call=2) for i in range(frames)]
    expected = np.stack(
        [by_the_equations(half, weights, heads, [r.tolist() for r in rows]) for half in hidden]
    )
    flat = torch.from_numpy(hidden).flatten(0, 1)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        q, k, v = (
            torch.nn.functional.linear(flat.to(dtype), torch.from_numpy(weights[name]).to(dtype))
            for name in "qkv"
        )
        empty = torch.zeros(0, 0, dtype=torch.int64)
        samples = Samples(torch.stack(rows[:bank]), torch.stack(rows[bank:]) if later else empty)
        got = consistent_self_attention(*(x.unflatten(-1, (heads, -1)) for x in (q, k, v)), samples)
        assert np.abs(got.flatten(2).double().numpy() - expected.reshape(-1, tokens, width)).max() < tolerance


def test_a_frame_samples_the_others_alone_each_token_once_and_anew_at_every_call() -> None:
    bank, tokens = 3, 20
    for i in range(5):
        own = i if i < bank else None
        first, second = (sample((i, SEED), own, bank, tokens, 0.5, call) for call in (0, 1))
        others = set(range(bank * tokens)) - set(
            range(i * tokens, (i + 1) * tokens) if own is not None else ()
        )
        assert set(first.tolist()) <= others and len(set(first.tolist())) == len(first) == len(others) // 2
        assert first.tolist() != second.tolist()
        assert set(sample((i, SEED), own, bank, tokens, 1.0, 0).tolist()) == others


class Paired(AttnProcessor2_0):
    """Eq. 2 and 3 in diffusers' own attention, which is given P_i as what it attends to."""

    def __init__(self, layers: int, bank: int, frames: list[int]) -> None:
        self.layers, self.bank, self.frames, self.count = layers, bank, frames, 0

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        call, tokens = self.count // self.layers, hidden_states.shape[1]
        self.count += 1
        paired = []
        for half in hidden_states.chunk(2):  # unconditional and conditional rows
            everything = half.flatten(0, 1)
            for n, i in enumerate(self.frames):
                seen = sample((i, SEED), n if n < self.bank else None, self.bank, tokens, 0.5, call)
                paired.append(torch.cat([half[n], everything[seen]]))
        outputs = [
            super(Paired, self).__call__(attn, own[None], with_others[None])
            for own, with_others in zip(hidden_states, paired, strict=True)
        ]
        return torch.cat(outputs)


def test_a_story_is_the_stock_pipelines_with_the_equations_for_self_attention(
    model: StoryModel, builtin_folder: Path
) -> None:
    """Tolerance: as for the IP-Adapter, latents differ by some 1e-6, so a pixel is rounded to its neighbour at most."""
    bank, windows = 2, ([0, 1, 2], [0, 1, 3])
    drawn = draw(CAPTIONS[:4], model=model, bank=bank, batch_size=3, **HOW).images
    pipeline = StableDiffusionPipeline.from_pretrained(
        builtin_folder, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    own = [name for name in pipeline.unet.attn_processors if name.endswith("attn1.processor")]
    stock = pipeline.unet.attn_processors
    plain = draw(CAPTIONS[:4], model=model, batch_size=3, **{**HOW, "mode": "plain"}).images
    for frames in windows:
        shared = Paired(len(own), bank, frames)
        pipeline.unet.set_attn_processor({**stock, **dict.fromkeys(own, shared)})
        expected = pipeline(
            [CAPTIONS[i] for i in frames],
            num_inference_steps=HOW["steps"],
            guidance_scale=HOW["guidance_scale"],
            generator=[torch.Generator().manual_seed(SEED) for _ in frames],
        ).images
        assert shared.count == HOW["steps"] * len(own)
        for picture, i in zip(expected, frames, strict=True):
            assert difference(picture, drawn[i]) <= 1, i
            assert difference(picture, plain[i]) > 10, i  # the check can fail


def test_without_sampled_tokens_it_is_plain_mode(model: StoryModel) -> None:
    none = draw(CAPTIONS[:3], model=model, bank=2, sampling_rate=0.0, batch_size=3, **HOW)
    plain = draw(CAPTIONS[:3], model=model, batch_size=3, **{**HOW, "mode": "plain"})
    assert [difference(a, b) <= 1 for a, b in zip(none.images, plain.images, strict=True)] == [True] * 3


def test_a_later_frame_sees_the_bank_and_no_other_frame(model: StoryModel) -> None:
    """Its bytes stay where another later frame has another caption, and do not where the bank has."""
    told = list(CAPTIONS)
    first = draw(told, model=model, bank=2, batch_size=4, **HOW).images
    others = draw(
        [*told[:3], "a bear in the city", *told[4:]], model=model, bank=2, batch_size=4, **HOW
    ).images
    changed = [a.tobytes() != b.tobytes() for a, b in zip(first, others, strict=True)]
    assert changed == [False, False, False, True, False]
    bank = draw([told[0], "a bear in the city", *told[2:]], model=model, bank=2, batch_size=4, **HOW).images
    assert all(a.tobytes() != b.tobytes() for a, b in zip(first, bank, strict=True))


def test_a_window_slides_over_the_story_and_no_call_holds_more(model: StoryModel) -> None:
    """5 frames, a bank of 2, 3 at once: three windows of one later frame, each in as many calls as there are steps."""
    rows = []
    hook = model.unet.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    with calls({"unet": model.unet}) as counted:
        events = list(generate(Story.from_captions(CAPTIONS), model=model, bank=2, batch_size=3, **HOW))
    hook.remove()
    assert counted["unet"] == 3 * HOW["steps"] and set(rows) == {2 * 3}
    assert [e.frame for e in events if isinstance(e, FrameDrawn)] == [0, 1, 2, 3, 4]  # each once
