"""What makes the history of causal mode, as components."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastory.checkpoints.history_encoder import LocalCausalAttention
from fastory.export.component import (
    BEHIND_ALL,
    RANGES,
    Axis,
    Component,
    Input,
    Reads,
    random_ids,
    random_padding,
)
from fastory.models.torch_model import StoryModel


class _NewestFrame(nn.Module):
    """The local causal attention of the newest frame: a ring holds its window alone, so all but padding is seen."""

    def __init__(self, local: LocalCausalAttention) -> None:
        super().__init__()
        self.local = local

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor, padding: Tensor) -> Tensor:
        """tokens (B, S, C_x) of the frame; keys, values (B, n, H, d) and padding (B, n) of its window -> (B, S, C_x)."""
        # Frames of one token, the query's own behind all of them: a band's sizes are constants of a graph, and the
        # window's length is not.
        out: Tensor = self.local(
            tokens, keys, values, padding, frame_tokens=1, window=0, first_frame=BEHIND_ALL
        )
        return out


def history(model: StoryModel) -> Iterator[Component]:
    """The history encoder (Blip), and what makes its tokens history: local causal attention and adapter."""
    encoder = model.require_history().encoder
    size, width = encoder.config.frame_tokens, encoder.config.width
    shape: tuple[Axis, ...] = ("batch", size, width)
    rows: Any = {"batch": RANGES["batch"]}, {"batch": 2}, [{"batch": n} for n in (1, 2, 5)]
    rest: Any = model.dtype, {"batch": 1}
    tokens = {"tokens": Input(shape, model.dtype)}
    yield Component(
        "history_encoder", Reads(encoder.multimodal, [encoder]), _seen(model), {"tokens": shape}, *rows, *rest
    )
    local = encoder.local_attention
    if local is not None:
        heads: tuple[Axis, ...] = (local.heads, width // local.heads)
        pair = {"keys": ("batch", size, *heads), "values": ("batch", size, *heads)}
        yield Component("history_keys_values", Reads(local.keys_values, [local]), tokens, pair, *rows, *rest)
        ring = Input(("batch", "keys", *heads), model.dtype)
        padding = Input(("batch", "keys"), torch.bool, random_padding)
        yield Component(
            "history_attention",
            _NewestFrame(local),
            {**tokens, "keys": ring, "values": ring, "padding": padding},
            {"history": shape},
            {"batch": RANGES["batch"], "keys": RANGES["keys"]},
            {"batch": 2, "keys": 3 * size},
            [{"batch": n, "keys": n * size} for n in (1, 2, 5)],
            model.dtype,
            {"batch": 1, "keys": 3 * size},
        )
    if encoder.adapter is not None:
        yield Component("history_adapter", encoder.adapter, tokens, {"history": shape}, *rows, *rest)


def _seen(model: StoryModel) -> dict[str, Input]:
    """A frame's caption and picture as the history encoder takes them."""
    config = model.require_history().encoder.config
    size, side = config.frame_tokens, int(config.vision["image_size"])

    def words(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """1 for the words of a caption, which come first."""
        ends = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        return (torch.arange(shape[1])[None] < ends).long()

    return {
        "ids": Input(("batch", size), torch.int64, random_ids(int(config.text["vocab_size"]))),
        "mask": Input(("batch", size), torch.int64, words),
        "pixels": Input(("batch", 3, side, side), model.dtype),
    }
