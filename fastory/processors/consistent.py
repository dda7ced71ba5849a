"""Consistent Self-Attention (StoryDiffusion, arXiv 2405.01434, section 3.1): a frame's pixels see tokens of other frames.

S_i = RandSample(I_1 .. I_{i-1}, I_{i+1} .. I_B)      tokens of the other frames of the batch (eq. 2)
P_i = [I_i ; S_i]
O_i = softmax(Q_i K_Pi' / sqrt d) V_Pi                Q_i of I_i; K_Pi, V_Pi of P_i by the layer's own projections (eq. 3)

The projections are linear, so K and V of the sampled tokens are those of their own frames, taken where they stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastory.processors.attention_backends import self_attention_of
from fastory.processors.projected import refuse_unknown


@dataclass(frozen=True)
class Samples:
    """Which tokens of the bank's K frames, counted through all K * L, each frame of a UNet call sees beside its own.

    bank: (K, n), of the bank's own frames, which see each other; later: (F - K, m), of those that see the whole bank.
    """

    bank: Tensor
    later: Tensor


def consistent_self_attention(query: Tensor, keys: Tensor, values: Tensor, samples: Samples) -> Tensor:
    """query, keys, values (R, L, H, d) of R = h * F rows, h times the F frames, the bank first -> (R, L, H, d).

    Every h-th of the rows, unconditional or conditional, sees tokens of its own rows alone.
    """
    count = len(samples.bank)
    frames = count + len(samples.later)
    parts = []
    for indices, rows in ((samples.bank, slice(0, count)), (samples.later, slice(count, frames))):
        if len(indices):
            own = (tensor.unflatten(0, (-1, frames))[:, rows] for tensor in (query, keys, values))
            q, k, v = own  # (h, rows, L, H, d)
            joined = (
                torch.cat([mine, _taken(tensor, frames, count, indices)], 2)
                for mine, tensor in ((k, keys), (v, values))
            )
            heads_first = (tensor.flatten(0, 1).transpose(1, 2) for tensor in (q, *joined))
            out = functional.scaled_dot_product_attention(*heads_first)
            parts.append(out.transpose(1, 2).unflatten(0, q.shape[:2]))
    return torch.cat(parts, 1).flatten(0, 1)


def _taken(tokens: Tensor, frames: int, bank: int, indices: Tensor) -> Tensor:
    """tokens (h * F, L, H, d), indices (rows, n) -> those of the bank at these indices, (h, rows, n, H, d)."""
    return tokens.unflatten(0, (-1, frames))[:, :bank].flatten(1, 2)[:, indices]


def self_attention_levels(unet: Any) -> list[int]:
    """How often the latents' sides were halved where a UNet has self-attention, each once.

    Raises InputError for a layer that is not as SD1.5 and SDXL have it.
    """
    layers = self_attention_of(unet)
    for name, (attn, _) in layers.items():
        refuse_unknown(f"{name}.processor", attn)
    return sorted({level for _, level in layers.values()})
