"""Grouped global reference cross-attention written as its definition: the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def _masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the last axis of `scores` where `visible`, zero where nothing is."""
    scores = scores.masked_fill(~visible, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0.0, 1.0)


def grca_reference(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    scale: Tensor,
    *,
    tokens_per_ref: int = 4,
    ref_offsets: Tensor | None = None,
    ref_visible: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """O[l] = softmax(Q[l] Kt' / sqrt d) Vt + sum_g scale_g mask_g[l] softmax(Q[l] Kg' / sqrt d) Vg.

    Story-Adapter (arXiv 2410.06244), global reference cross-attention, and its grouped form, computed in the
    inputs' own type. Arguments, shapes and result as `fastory.kernels.grca.grca`;
    float64 tensors make it the oracle. Nothing is validated.
    """
    rows, _, _, head_dim = q.shape
    refs = k_ref.shape[1]
    q = q / head_dim**0.5
    text = torch.einsum("blhd,bkhd->blhk", q, k_text.expand(rows, -1, -1, -1)).softmax(-1)
    out = torch.einsum("blhk,bkhd->blhd", text, v_text.expand(rows, -1, -1, -1))
    if refs == 0:
        return out
    read = torch.arange(rows, device=q.device) % k_ref.shape[0]
    scores = torch.einsum("blhd,bkhd->blhk", q, k_ref[read])
    groups = 1 if ref_offsets is None else ref_offsets.shape[0] - 1
    scale = scale.to(q.dtype).expand(rows, groups)
    key = torch.arange(refs, device=q.device)
    for g in range(groups):
        visible = key.new_ones(refs, dtype=torch.bool)
        if ref_offsets is not None:
            visible = (key >= ref_offsets[g]) & (key < ref_offsets[g + 1])
        visible = visible.expand(rows, refs)
        if ref_visible is not None:
            visible = visible & ref_visible.repeat_interleave(tokens_per_ref, 1)
        weights = _masked_softmax(scores, visible[:, None, None, :])
        group = torch.einsum("blhk,bkhd->blhd", weights, v_ref[read])
        gate = scale[:, g, None] if mask is None else scale[:, g, None] * mask[:, g].to(q.dtype)
        out = out + gate[:, :, None, None] * group
    return out
