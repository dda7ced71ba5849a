"""The bytes that bench/memory.py states by formula are those that the tensors have, and its trace sees them."""

from __future__ import annotations

import memory
import pytest
import torch

from fastory import StoryModel


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu", dtype="float32")


@pytest.mark.parametrize("frames", [4, 12])
def test_the_formula_of_references_is_what_lies_there(frames: int, model: StoryModel) -> None:
    context, held = memory.with_references(model, frames, 2)
    shape = memory.UnetShape.of(model.unet, 4)
    assert held == context.inputs()["ref_kv"].nbytes == memory.grca_bytes(shape, frames)


@pytest.mark.parametrize(("bank", "later"), [(4, 1), (6, 0)])
def test_the_formula_of_frames_is_what_the_layer_joins(
    bank: int, later: int, model: StoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K and V as scaled_dot_product_attention gets them, and a peak that holds them and no more than four times as much."""
    joined = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def seen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        joined.append(key.nbytes + value.nbytes)
        return attention(query, key, value)

    call = memory.layer_call(model, "attn1", memory.with_frames(model, bank, later), bank + later)
    with torch.inference_mode():
        peak = memory.peak_bytes(call)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
        call()
    expected = memory.csa_bytes(memory.UnetShape.of(model.unet, 4), bank, later)
    parts = memory.csa_bytes(
        memory.UnetShape.of(model.unet, 4), bank, 0
    )  # the bank and the window are two calls
    assert sum(joined) == expected and joined[0] <= parts
    assert max(joined) < peak < 4 * expected


def test_the_peak_is_of_what_lives_at_once() -> None:
    def call() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first
        assert len(second + 1) == 1000

    assert 2 * 4000 <= memory.peak_bytes(call) < 2.1 * 4000  # scalars beside them
