"""Grouped global reference cross-attention from 1 + G attentions: CPU path, fallback, backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastory.kernels.attend import Attend


def _visible_keys(
    group: int, keys: int, tokens_per_ref: int, ref_offsets: Tensor | None, ref_visible: Tensor | None
) -> Tensor | None:
    """Which reference keys belong to `group` and are seen, (B or 1, 1, 1, Lr) bool; None for all of them.

    The offsets stay on their device: a key's group comes from a comparison. One group holds every key.
    """
    visible = None
    if ref_visible is not None:
        visible = ref_visible.repeat_interleave(tokens_per_ref, 1, output_size=keys)[:, None, None, :]
    if ref_offsets is not None and ref_offsets.shape[0] > 2:
        key = torch.arange(keys, device=ref_offsets.device)
        inside = ((key >= ref_offsets[group]) & (key < ref_offsets[group + 1]))[None, None, None, :]
        visible = inside if visible is None else visible & inside
    return visible


def _attend_references(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, attend: Attend) -> Tensor:
    """Attention of row b of q to row b % R of k and v, without expanding them in memory."""
    rows, kept = q.shape[0], k.shape[0]
    if kept in (1, rows):
        return attend(q, k, v, visible)
    parts = []
    for start in range(0, rows, kept):
        part = slice(start, start + kept)
        seen = visible if visible is None or visible.shape[0] == 1 else visible[part]
        parts.append(attend(q[part], k, v, seen))
    return torch.cat(parts)


def grca_composed(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    scale: Tensor,
    tokens_per_ref: int,
    ref_offsets: Tensor | None,
    ref_visible: Tensor | None,
    mask: Tensor | None,
    attend: Attend,
) -> Tensor:
    """The operator as 1 + G calls of `attend`, differentiable, reading no tensor on the host.

    Arguments as `fastory.kernels.grca.grca`. A row's bytes depend on that row alone (same shapes):
    `attend` treats rows apart and the rest is elementwise, multiplied and added in two roundings.
    """
    out = attend(q, k_text, v_text, None)
    keys = k_ref.shape[1]
    groups = 1 if ref_offsets is None else ref_offsets.shape[0] - 1
    if keys == 0:
        return out.contiguous()
    for group in range(groups):
        visible = _visible_keys(group, keys, tokens_per_ref, ref_offsets, ref_visible)
        gate = scale if scale.dim() == 0 else scale[..., group]
        if gate.dim() == 1:
            gate = gate[:, None, None, None]
        if mask is not None:
            gate = gate * mask[:, group, :, None, None]
        out = out + _attend_references(q, k_ref, v_ref, visible, attend) * gate
    return out.to(q.dtype).contiguous()
