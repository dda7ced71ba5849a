"""Biases of attention scores by which characters keep apart, as contexts hold them: (rows, L, keys) for each L query tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from fastory.processors.projected import attend_biased

Biases = dict[int, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Self-attention: query, keys, values (B, L, H, d) -> (B, L, H, d)."""


def put(biases: Biases | None, index: int, own: Mapping[int, Tensor] | None) -> None:
    """Write a row's own where row `index` is, and 0 for a row without; nothing where the context has none."""
    for tokens, bias in (biases or {}).items():
        bias[index : index + 1] = 0 if own is None else own[tokens]


def last_rows(biases: Biases | None, count: int) -> Biases | None:
    """Those of the last `count` rows, in the same memory."""
    return biases and {tokens: bias[-count:] for tokens, bias in biases.items()}


def self_attention(bias: Tensor | None) -> Attention | None:
    """Self-attention with this bias (B, L, L); None where it is as ever."""
    return None if bias is None else partial(attend_biased, bias=bias)
