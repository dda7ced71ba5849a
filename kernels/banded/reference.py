"""Local causal attention over groups of tokens written as its definition: the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def band(
    queries: int,
    keys: int,
    group_size: int,
    window: int,
    query_group: int,
    query_group_size: int | None,
    prefix: int,
    device: torch.device,
) -> Tensor:
    """The local causal attention mask (Lq, prefix + Lk) bool, True where query i may see key j.

    Causal-Story (ICASSP 2024), equation 3, for frames of group_size tokens, the diagonal allowed.
    """
    step = group_size if query_group_size is None else query_group_size
    query = torch.arange(queries, device=device)
    row = torch.full_like(query, query_group) if step == 0 else query_group + query // step
    column = torch.arange(-prefix, keys - prefix, device=device)
    group = column.div(group_size, rounding_mode="floor")
    allowed = group[None, :] <= row[:, None]
    if window > 0:
        allowed &= group[None, :] > row[:, None] - window
    return allowed | (column < 0)


def banded_causal_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    window: int,
    query_group: int = 0,
    query_group_size: int | None = None,
    key_padding: Tensor | None = None,
    prefix: int = 0,
) -> Tensor:
    """softmax(Q K' / sqrt d + M) V with M the local causal mask, -inf at padded keys; an empty row gives 0.

    Arguments, shapes and result as `fastory.kernels.banded.banded_causal_attention`, computed in the
    inputs' own type; float64 tensors make it the oracle. Nothing is validated.
    """
    rows, queries, _, head_dim = q.shape
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    k, v = k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)
    visible = band(
        queries, k.shape[1], group_size, window, query_group, query_group_size, prefix, q.device
    ).expand(rows, -1, -1)
    if key_padding is not None:
        visible = visible & ~key_padding[:, None, :]
    visible = visible[:, :, None, :]
    scores = torch.einsum("blhd,bkhd->blhk", q / head_dim**0.5, k).masked_fill(~visible, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0.0, 1.0)
    return torch.einsum("blhk,bkhd->blhd", weights, v)
