"""Grouped global reference cross-attention in one pass over q, in Triton.

    O[l] = softmax(Q[l] Kt' / sqrt d) Vt + sum_g scale_g mask_g[l] softmax(Q[l] Kg' / sqrt d) Vg

Story-Adapter (arXiv 2410.06244). A program computes BLOCK_M queries of one head of one row: the text by online softmax,
then each group's references, added with its gate. In a group it reads the keys from the first to the last that its row
sees (ref_ranges): an unconditional row, which sees one null block, does not pay for the references. Groups of which that
leaves at most 8 keys share a tile, because a tile for each would cost the same for 8 keys as for 16, and a rescaling
besides; a longer group has online softmax into a second accumulator.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastory.kernels import backends
from fastory.kernels.configs import capability, lookup
from fastory.kernels.grca.ranges import visible_ranges
from fastory.kernels.tiles import (
    SLOT,
    attend_keys,
    attend_slots,
    empty_softmax,
    load_rows,
    split,
    store_rows,
    stride_divisor,
)

CONFIGS = Path(__file__).with_name("configs")
LOG2_E = 1.4426950408889634
RUNTIME = [
    *("queries", "text_keys", "ref_keys", "ref_rows", "groups"),
    *("q_row", "q_token", "q_head", "kt_row", "kt_token", "kt_head", "vt_row", "vt_token", "vt_head"),
    *("kr_row", "kr_token", "kr_head", "vr_row", "vr_token", "vr_head", "out_row", "out_token"),
    *("scale_row", "scale_group", "visible_row", "range_row", "mask_row", "mask_group", "mask_query"),
]


@triton.jit
def _group_bounds(ref_offsets, ref_ranges, group, ref_keys):
    """Keys [from, to) that a row reads of a group, and the part of them in which some are unseen."""
    first, last = ref_keys * 0, ref_keys
    gap, gap_end = ref_keys, ref_keys
    if ref_ranges is not None:
        first = tl.load(ref_ranges + 4 * group)
        last = tl.load(ref_ranges + 4 * group + 1)
        gap = tl.load(ref_ranges + 4 * group + 2)
        gap_end = tl.load(ref_ranges + 4 * group + 3)
    elif ref_offsets is not None:
        first = tl.load(ref_offsets + group).to(tl.int32)
        last = tl.load(ref_offsets + group + 1).to(tl.int32)
    return first, last, gap, gap_end


@triton.jit
def _short_bounds(ref_offsets, ref_ranges, group, there):
    """Keys [from, to) that a row reads of several groups (n,), those `there`."""
    if ref_ranges is not None:
        first = tl.load(ref_ranges + 4 * group, mask=there, other=0)
        last = tl.load(ref_ranges + 4 * group + 1, mask=there, other=0)
    else:
        first = tl.load(ref_offsets + group, mask=there, other=0).to(tl.int32)
        last = tl.load(ref_offsets + group + 1, mask=there, other=0).to(tl.int32)
    return first, last


@triton.jit
def _gate(scale, mask, group, query, keep, scale_group, mask_group, mask_query):
    """scale_g mask_g[l] of a tile's queries, float32 (BLOCK_M,)."""
    weight = tl.load(scale + group * scale_group).to(tl.float32)
    gate = tl.zeros(query.shape, tl.float32) + weight
    if mask is not None:
        inside = mask + group * mask_group + query * mask_query
        gate *= tl.load(inside, mask=keep, other=0.0).to(tl.float32)
    return gate


@triton.jit
def _gates(scale, mask, group, there, query, keep, scale_group, mask_group, mask_query):
    """scale_g mask_g[l] of several groups (n,), those `there`: float32 (BLOCK_M, n)."""
    weight = tl.load(scale + group * scale_group, mask=there, other=0.0).to(tl.float32)
    gate = tl.zeros((query.shape[0], group.shape[0]), tl.float32) + weight[None, :]
    if mask is not None:
        inside = mask + group[None, :] * mask_group + query[:, None] * mask_query
        gate *= tl.load(inside, mask=keep[:, None] & there[None, :], other=0.0).to(tl.float32)
    return gate


@triton.jit
def _add_short_groups(
    q0, q1, k_ref, v_ref, scale, ref_offsets, ref_visible, ref_ranges, mask, query, keep, groups, kr_token, vr_token,
    scale_group, mask_group, mask_query, out0, out1,
    TOKENS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds the groups of at most SLOT keys: (first longer group, end of the longer groups, both parts of out)."""
    longer, beyond = groups, groups * 0
    for chunk in range(0, groups, SLOTS):
        group = chunk + tl.arange(0, SLOTS)
        there = group < groups
        first, last = _short_bounds(ref_offsets, ref_ranges, group, there)
        short = last - first <= SLOT
        longer = tl.minimum(longer, tl.min(tl.where(short, groups, group), 0))
        beyond = tl.maximum(beyond, tl.max(tl.where(short, 0, group + 1), 0))
        last = tl.where(short, last, first)
        if tl.max(last - first, 0) > 0:
            gate = _gates(scale, mask, group, there, query, keep, scale_group, mask_group, mask_query)
            out0, out1 = attend_slots(
                q0, q1, k_ref, v_ref, ref_visible, first, last, gate, kr_token, vr_token, out0, out1,
                TOKENS, D, D0, D1, SCALE, PRECISION, UPCAST, SLOTS,
            )  # fmt: skip
    return longer, beyond, out0, out1


@triton.jit
def _add_group(
    q0, q1, k_ref, v_ref, scale, ref_offsets, ref_visible, ref_ranges, mask, query, keep, group, ref_keys,
    kr_token, vr_token, scale_group, mask_group, mask_query, out0, out1,
    TOKENS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Both parts of out with one group added, or, where SLOTS is not 0, with one that _add_short_groups left out."""
    first, last, gap, gap_end = _group_bounds(ref_offsets, ref_ranges, group, ref_keys)
    if SLOTS == 0 or last - first > SLOT:
        top, total, acc0, acc1 = empty_softmax(BLOCK_M, D0, D1)
        top, total, acc0, acc1 = attend_keys(
            q0, q1, k_ref, v_ref, ref_visible, gap, gap_end, None, None, first, last, kr_token, vr_token,
            top, total, acc0, acc1, 1, TOKENS, False, D, D0, D1, SCALE, PRECISION, UPCAST, BLOCK_N,
        )  # fmt: skip
        gate = _gate(scale, mask, group, query, keep, scale_group, mask_group, mask_query)
        gate /= tl.where(total > 0.0, total, 1.0)
        out0 += acc0 * gate[:, None]
        if D1 > 0:
            out1 += acc1 * gate[:, None]
    return out0, out1


@triton.jit(do_not_specialize=RUNTIME)
def grca_kernel(
    q, k_text, v_text, k_ref, v_ref, scale, ref_offsets, ref_visible, ref_ranges, mask, out,
    queries, text_keys, ref_keys, ref_rows, groups,
    q_row, q_token, q_head, kt_row, kt_token, kt_head, vt_row, vt_token, vt_head,
    kr_row, kr_token, kr_head, vr_row, vr_token, vr_head, out_row, out_token,
    scale_row, scale_group, visible_row, range_row, mask_row, mask_group, mask_query,
    TOKENS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    STRIDE_DIVISOR: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (H, ceil(L / BLOCK_M), B): heads fastest, because neighbouring heads share the cache lines of q and out.

    Strides of q, k, v and out come divided by STRIDE_DIVISOR. Offsets to a row, a head or a token are int64.
    """
    q_token, out_token = q_token.to(tl.int64) * STRIDE_DIVISOR, out_token.to(tl.int64) * STRIDE_DIVISOR
    kt_token, vt_token = kt_token.to(tl.int64) * STRIDE_DIVISOR, vt_token.to(tl.int64) * STRIDE_DIVISOR
    kr_token, vr_token = kr_token.to(tl.int64) * STRIDE_DIVISOR, vr_token.to(tl.int64) * STRIDE_DIVISOR
    head = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * BLOCK_M
    row = tl.program_id(2).to(tl.int64)
    ref_row = row % ref_rows
    step = tl.arange(0, BLOCK_M)
    query = start.to(tl.int32) + step
    keep = query < queries
    q += (row * q_row + head * q_head) * STRIDE_DIVISOR + start * q_token
    k_text += (row * kt_row + head * kt_head) * STRIDE_DIVISOR
    v_text += (row * vt_row + head * vt_head) * STRIDE_DIVISOR
    k_ref += (ref_row * kr_row + head * kr_head) * STRIDE_DIVISOR
    v_ref += (ref_row * vr_row + head * vr_head) * STRIDE_DIVISOR
    scale += row * scale_row
    if ref_visible is not None:
        ref_visible += row * visible_row
    if ref_ranges is not None:
        ref_ranges += row * range_row
    if mask is not None:
        mask += row * mask_row
    q0, q1 = load_rows(q + step * q_token, keep, D, D0, D1)
    top, total, out0, out1 = empty_softmax(BLOCK_M, D0, D1)
    top, total, out0, out1 = attend_keys(
        q0, q1, k_text, v_text, None, None, None, None, None, text_keys * 0, text_keys, kt_token, vt_token,
        top, total, out0, out1, 1, 1, False, D, D0, D1, SCALE, PRECISION, UPCAST, BLOCK_N,
    )  # fmt: skip
    out0 = out0 / total[:, None]
    if D1 > 0:
        out1 = out1 / total[:, None]
    longer, end = groups * 0, groups
    if SLOTS > 0:
        longer, end, out0, out1 = _add_short_groups(
            q0, q1, k_ref, v_ref, scale, ref_offsets, ref_visible, ref_ranges, mask, query, keep, groups, kr_token, vr_token,
            scale_group, mask_group, mask_query, out0, out1,
            TOKENS, D, D0, D1, SCALE, PRECISION, UPCAST, SLOTS,
        )  # fmt: skip
    for group in range(longer, end):
        out0, out1 = _add_group(
            q0, q1, k_ref, v_ref, scale, ref_offsets, ref_visible, ref_ranges, mask, query, keep, group, ref_keys,
            kr_token, vr_token, scale_group, mask_group, mask_query, out0, out1,
            TOKENS, D, D0, D1, SCALE, PRECISION, UPCAST, SLOTS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    out += row * out_row * STRIDE_DIVISOR + start * out_token + head * D
    store_rows(out + step * out_token, keep, out0, out1, D, D0, D1)


@functools.cache
def settings(capability: int, bits: int, width: int, queries: int, groups: int = 1) -> dict[str, Any]:
    """Launch settings for compute capability 80, 90, ..., element bits, head width, L and groups."""
    return lookup(CONFIGS, capability, bits, width, queries, groups)


def arguments(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    scale: Tensor,
    ref_offsets: Tensor | None,
    ref_visible: Tensor | None,
    ref_ranges: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
) -> tuple[list, int]:
    """The kernel's arguments up to its constants, in order, and STRIDE_DIVISOR."""
    rows, queries = q.shape[:2]
    groups = 0 if k_ref.shape[1] == 0 else 1 if ref_offsets is None else ref_offsets.shape[0] - 1
    tensors = [q, k_text.expand(rows, -1, -1, -1), v_text.expand(rows, -1, -1, -1), k_ref, v_ref, out]
    strides = [stride for x in tensors for stride in x.stride()[:3]][:-1]
    divisor = stride_divisor(*strides, *(x.data_ptr() // x.element_size() for x in tensors))
    weights = scale.expand(rows, scale.shape[-1] if scale.dim() else 1)
    if ref_visible is not None:
        ref_visible = ref_visible.contiguous()
    visible_row = 0 if ref_visible is None else ref_visible.shape[1]
    if ref_ranges is not None:
        ref_ranges = ref_ranges.contiguous()
    if ref_offsets is not None:
        ref_offsets = ref_offsets.contiguous()
    mask_strides = (0, 0, 0) if mask is None else mask.expand(rows, -1, -1).stride()
    pointers = [q, k_text, v_text, k_ref, v_ref, scale, ref_offsets, ref_visible, ref_ranges, mask, out]
    sizes = [queries, k_text.shape[1], k_ref.shape[1], k_ref.shape[0], groups]
    return [
        *pointers,
        *sizes,
        *(stride // divisor for stride in strides),
        *weights.stride(),
        visible_row,
        4 * groups,
        *mask_strides,
    ], divisor


def slots(groups: int, dtype: torch.dtype, block: int) -> int:
    """How many groups of at most 8 keys share a tile, 0 where none do: the layout it counts on is that of 16 bits."""
    if groups < 2 or dtype == torch.float32:
        return 0
    return 4 if groups <= 4 else max(4, block // 8)


def constants(
    width: int, tokens_per_ref: int, dtype: torch.dtype, divisor: int, slots: int = 0
) -> dict[str, object]:
    """The kernel's compile-time arguments, its launch settings aside."""
    first, second = split(width)
    return {
        "TOKENS": tokens_per_ref,
        "D": width,
        "D0": first,
        "D1": second,
        "SCALE": LOG2_E / width**0.5,
        "STRIDE_DIVISOR": divisor,
        "SLOTS": slots,
        "UPCAST": backends.interpreted() and dtype == torch.bfloat16,
    }


def grca_triton(
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
    ref_ranges: Tensor | None = None,
) -> Tensor:
    """Launches the kernel. Arguments, shapes and result as `fastory.kernels.grca.grca`, which validates them.

    d is a multiple of 8 up to 256; float16, bfloat16 or float32. On a CPU it runs in Triton's interpreter. Without
    ref_ranges they are computed from ref_visible, in some twenty launches more.
    """
    rows, queries, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if ref_visible is not None and ref_ranges is None:
        ref_ranges = visible_ranges(ref_visible, ref_offsets, tokens_per_ref)
    passed, divisor = arguments(
        q, k_text, v_text, k_ref, v_ref, scale, ref_offsets, ref_visible, ref_ranges, mask, out
    )
    groups = 1 if ref_offsets is None else ref_offsets.shape[0] - 1
    launch = settings(capability(q.device), 8 * q.element_size(), width, queries, groups)
    together = slots(groups, q.dtype, launch["BLOCK_N"])
    fixed = constants(width, tokens_per_ref, q.dtype, divisor, together)
    grid = (heads, triton.cdiv(queries, launch["BLOCK_M"]), rows)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        grca_kernel[grid](*passed, **fixed, **launch)
    return out
