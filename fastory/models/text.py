"""Captions as tokenizers cut them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastory.checkpoints.history import ENC


def lost_words(tokenizer: Any, prompt: str) -> str:
    """What the tokenizer's limit cuts off `prompt`; empty where it fits."""
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    limit = tokenizer.model_max_length
    return "" if len(ids) <= limit else tokenizer.decode(ids[limit - 1 : -1]).strip()


def token_places(
    tokenizer: Any, prompt: str, spans: Mapping[str, Sequence[tuple[int, int]]], limit: int | None = None
) -> dict[str, list[int]]:
    """The tokens of each name's spans of `prompt`, by their place in the text encoder's input; cut-off ones are left out.

    limit: in tokens, the tokenizer's own where it is not given. A tokenizer that does not say where its tokens stand (one
    without a Rust part) gives none.
    """
    if not getattr(tokenizer, "is_fast", False):
        return {name: [] for name in spans}
    limit = limit or tokenizer.model_max_length
    offsets = tokenizer(prompt, truncation=True, max_length=limit, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    return {
        name: [
            index
            for index, (first, end) in enumerate(offsets)
            if first < end and any(start <= first and end <= stop for start, stop in of_name)
        ]
        for name, of_name in spans.items()
    }


def nearest_tokens(named: Mapping[str, Sequence[int]], count: int) -> dict[str, list[int]]:
    """Each of `count` tokens with the name whose own token is nearest, of two the one that comes first in `named`."""
    found: dict[str, list[int]] = {name: [] for name in named}
    there = [name for name in named if named[name]]
    for token in range(count if there else 0):
        nearest = min(there, key=lambda name: min(abs(token - own) for own in named[name]))
        found[nearest].append(token)
    return found


def padding_of(tokenizer: Any, prompt: str) -> Tensor:
    """(1, Lt) bool: True where the tokens of `prompt` are padding, which causal mode never looks at."""
    return filled(tokenizer, prompt, tokenizer.model_max_length).attention_mask == 0


def filled(tokenizer: Any, prompt: str, length: int) -> Any:
    """input_ids and attention_mask (1, length) of `prompt`, cut or padded."""
    return tokenizer(prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


def history_ids(tokenizer: Any, prompt: str, length: int) -> tuple[Tensor, Tensor]:
    """ids and mask (1, length) of a caption as the history encoder takes them: [ENC] first where BLIP's tokenizer has it."""
    text = filled(tokenizer, prompt, length)
    ids: Tensor = text.input_ids
    if ENC in tokenizer.get_vocab():
        ids[:, 0] = tokenizer.convert_tokens_to_ids(ENC)
    mask: Tensor = text.attention_mask
    return ids, mask


def guidance_embedding(scale: float, rows: int, width: int) -> Tensor:
    """diffusers' embedding (rows, width) of the guidance scale, for a UNet distilled with it (LCM)."""
    import diffusers

    make: Any = (
        diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    )  # it reads nothing of its pipeline
    embedding: Tensor = make(None, torch.full((rows,), scale - 1), embedding_dim=width)
    return embedding
