"""One softmax attention over (rows, tokens, H, d) by PyTorch or xformers: compositions are made of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt d) v by torch's scaled_dot_product_attention; a query that sees no key gets zero.

    q (B, L, H, d); k, v (B or 1, K, H, d), one row is read by all without a copy;
    visible (B or 1, 1, L or 1, K) bool.
    """
    rows = q.shape[0]
    if k.shape[0] != rows:
        k, v = k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)
    heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    if visible is None:
        return F.scaled_dot_product_attention(*heads).transpose(1, 2)
    if q.device.type == "cpu" and not torch.is_grad_enabled():
        # The CPU kernels return zero for a query that sees nothing; the tests hold them to it.
        return F.scaled_dot_product_attention(*heads, attn_mask=visible).transpose(1, 2)
    # Elsewhere, and in a backward pass, such a query may give NaN: let it see every key, drop the result.
    seen = visible.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(*heads, attn_mask=visible | ~seen)
    return torch.where(seen, out, out.new_zeros(())).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """The same by xformers' memory_efficient_attention (CUDA)."""
    from xformers.ops import memory_efficient_attention

    rows, queries, heads, _ = q.shape
    keys = k.shape[1]
    k, v = k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)
    if visible is None:
        return memory_efficient_attention(q, k, v)
    seen = visible.any(-1, keepdim=True)
    # xformers wants the bias materialised, its rows padded to a multiple of 8.
    bias = q.new_full((rows, heads, queries, math.ceil(keys / 8) * 8), -math.inf)[..., :keys]
    bias.masked_fill_(visible | ~seen, 0.0)
    out = memory_efficient_attention(q, k, v, attn_bias=bias)
    return torch.where(seen.transpose(1, 2), out, out.new_zeros(()))
