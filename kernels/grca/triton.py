"""Grouped global reference cross-attention in one pass over q, in Triton.

    O[l] = softmax(Q[l] Kt' / sqrt d) Vt + sum_g scale_g mask_g[l] softmax(Q[l] Kg' / sqrt d) Vg

Story-Adapter (arXiv 2410.06244). A program computes BLOCK_M queries of one head of one row. Two ways:

* `one_tile`: text and references fit BLOCK_N keys together. One tile of scores, a maximum and a sum per segment, and one
  product with [e_text / l_text | gate_g e_g / l_g] as weights: no rescaling, no second accumulator.
* `online`: the text by online softmax, then each group's references into a second accumulator, added with its gate.
  A program reads the keys from the first to the last that its row sees in a group: an unconditional row, which sees
  one null block, does not pay for the references.
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

from fastory.kernels import choice
from fastory.kernels.configs import capability, lookup
from fastory.kernels.tiles import (
    choose_rows,
    empty_softmax,
    load_rows,
    pieces,
    rescale,
    score,
    seen_range,
    split,
    store_rows,
    weigh,
)

CONFIGS = Path(__file__).with_name("configs")
LOG2_E = 1.4426950408889634
RUNTIME = [
    *("queries", "text_keys", "ref_keys", "ref_rows", "groups"),
    *("q_row", "q_token", "q_head", "kt_row", "kt_token", "kt_head", "vt_row", "vt_token", "vt_head"),
    *("kr_row", "kr_token", "kr_head", "vr_row", "vr_token", "vr_head", "out_row", "out_token"),
    *("scale_row", "scale_group", "visible_row", "mask_row", "mask_group", "mask_query"),
]


@triton.jit
def _group_bounds(ref_offsets, group, ref_keys):
    """Keys [from, to) of a group."""
    if ref_offsets is None:
        first, last = ref_keys * 0, ref_keys
    else:
        first = tl.load(ref_offsets + group).to(tl.int32)
        last = tl.load(ref_offsets + group + 1).to(tl.int32)
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
def _sees(visible, ref, keep, TOKENS: tl.constexpr):
    """Which reference keys the row sees."""
    if visible is not None:
        keep = keep & (tl.load(visible + ref // TOKENS, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _one_tile(
    q0, q1, query, keep, k_text, v_text, k_ref, v_ref, scale, ref_offsets, visible, mask,
    text_keys, ref_keys, groups, kt_token, vt_token, kr_token, vr_token, scale_group, mask_group, mask_query,
    TOKENS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Segmented softmax over one tile that holds the text keys and, right after them, the reference keys."""
    key = tl.arange(0, BLOCK_N)
    text = key < text_keys
    ref = key - text_keys
    seen = _sees(visible, ref, (ref >= 0) & (ref < ref_keys), TOKENS)
    k = choose_rows(text, k_text + key * kt_token, k_ref + ref * kr_token, ALIGNED)
    k0, k1 = load_rows(k, text | seen, D, D0, D1)
    s = score(q0, q1, k0, k1, D1, PRECISION, UPCAST)
    top = tl.max(tl.where(text[None, :], s, float("-inf")), 1)
    s = tl.where(text[None, :], s * SCALE - (top * SCALE)[:, None], s)
    for group in range(groups):
        first, last = _group_bounds(ref_offsets, group, ref_keys)
        inside = seen & (ref >= first) & (ref < last)
        top = tl.max(tl.where(inside[None, :], s, float("-inf")), 1)
        s = tl.where(inside[None, :], s * SCALE - (top * SCALE)[:, None], s)
    p = tl.where((text | seen)[None, :], tl.exp2(s), 0.0)
    total = tl.sum(tl.where(text[None, :], p, 0.0), 1)
    weight = tl.where(text[None, :], (1.0 / total)[:, None], 0.0)
    for group in range(groups):
        first, last = _group_bounds(ref_offsets, group, ref_keys)
        inside = seen & (ref >= first) & (ref < last)
        total = tl.sum(tl.where(inside[None, :], p, 0.0), 1)
        gate = _gate(scale, mask, group, query, keep, scale_group, mask_group, mask_query)
        gate /= tl.where(total > 0.0, total, 1.0)
        weight = tl.where(inside[None, :], gate[:, None], weight)
    v = choose_rows(text, v_text + key * vt_token, v_ref + ref * vr_token, ALIGNED)
    v0, v1 = load_rows(v, text | seen, D, D0, D1)
    _, _, out0, out1 = empty_softmax(BLOCK_M, D0, D1)
    return weigh(p * weight, v0, v1, out0, out1, D1, PRECISION, UPCAST)


@triton.jit
def _online_segment(
    q0, q1, k, v, visible, first, last, k_token, v_token,
    TOKENS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Softmax attention to keys first .. last by online softmax, key `first` being one that is seen: (total, parts)."""
    top, total, acc0, acc1 = empty_softmax(BLOCK_M, D0, D1)
    step = tl.arange(0, BLOCK_N)
    k += first * k_token
    v += first * v_token
    for start in range(first, last, BLOCK_N):
        keep = start + step < last
        seen = _sees(visible, start + step, keep, TOKENS)
        k0, k1 = load_rows(k + step * k_token, keep, D, D0, D1)
        s = score(q0, q1, k0, k1, D1, PRECISION, UPCAST)
        s = tl.where(seen[None, :], s, float("-inf"))
        p, top, total, acc0, acc1 = rescale(s, top, total, acc0, acc1, SCALE, False, D1)
        v0, v1 = load_rows(v + step * v_token, keep, D, D0, D1)
        acc0, acc1 = weigh(p, v0, v1, acc0, acc1, D1, PRECISION, UPCAST)
        k += BLOCK_N * k_token
        v += BLOCK_N * v_token
    return total, acc0, acc1


@triton.jit
def _online(
    q0, q1, query, keep, k_text, v_text, k_ref, v_ref, scale, ref_offsets, visible, mask,
    text_keys, ref_keys, groups, kt_token, vt_token, kr_token, vr_token, scale_group, mask_group, mask_query,
    TOKENS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Text, then one group after another."""
    total, out0, out1 = _online_segment(
        q0, q1, k_text, v_text, None, text_keys * 0, text_keys, kt_token, vt_token,
        TOKENS, D, D0, D1, SCALE, PRECISION, UPCAST, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    out0 = out0 / total[:, None]
    if D1 > 0:
        out1 = out1 / total[:, None]
    for group in range(groups):
        first, last = _group_bounds(ref_offsets, group, ref_keys)
        if visible is not None:
            block, end = seen_range(visible, first // TOKENS, tl.cdiv(last, TOKENS), 1, 128)
            first = tl.maximum(first, block * TOKENS)
            last = tl.minimum(last, end * TOKENS)
        total, acc0, acc1 = _online_segment(
            q0, q1, k_ref, v_ref, visible, first, last, kr_token, vr_token,
            TOKENS, D, D0, D1, SCALE, PRECISION, UPCAST, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        gate = _gate(scale, mask, group, query, keep, scale_group, mask_group, mask_query)
        gate /= tl.where(total > 0.0, total, 1.0)
        out0 += acc0 * gate[:, None]
        if D1 > 0:
            out1 += acc1 * gate[:, None]
    return out0, out1


@triton.jit(do_not_specialize=RUNTIME)
def grca_kernel(
    q, k_text, v_text, k_ref, v_ref, scale, ref_offsets, ref_visible, mask, out,
    queries, text_keys, ref_keys, ref_rows, groups,
    q_row, q_token, q_head, kt_row, kt_token, kt_head, vt_row, vt_token, vt_head,
    kr_row, kr_token, kr_head, vr_row, vr_token, vr_head, out_row, out_token,
    scale_row, scale_group, visible_row, mask_row, mask_group, mask_query,
    TOKENS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    PIECE: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (H, ceil(L / BLOCK_M), B): heads fastest, because neighbouring heads share the cache lines of q and out.

    Strides of q, k, v and out come divided by PIECE. Offsets to a row, a head or a token are int64.
    """
    q_token, out_token = q_token.to(tl.int64) * PIECE, out_token.to(tl.int64) * PIECE
    kt_token, vt_token = kt_token.to(tl.int64) * PIECE, vt_token.to(tl.int64) * PIECE
    kr_token, vr_token = kr_token.to(tl.int64) * PIECE, vr_token.to(tl.int64) * PIECE
    head = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * BLOCK_M
    row = tl.program_id(2).to(tl.int64)
    ref_row = row % ref_rows
    step = tl.arange(0, BLOCK_M)
    query = start.to(tl.int32) + step
    keep = query < queries
    q += (row * q_row + head * q_head) * PIECE + start * q_token
    k_text += (row * kt_row + head * kt_head) * PIECE
    v_text += (row * vt_row + head * vt_head) * PIECE
    k_ref += (ref_row * kr_row + head * kr_head) * PIECE
    v_ref += (ref_row * vr_row + head * vr_head) * PIECE
    scale += row * scale_row
    if ref_visible is not None:
        ref_visible += row * visible_row
    if mask is not None:
        mask += row * mask_row
    q0, q1 = load_rows(q + step * q_token, keep, D, D0, D1)
    if ONE_TILE:
        out0, out1 = _one_tile(
            q0, q1, query, keep, k_text, v_text, k_ref, v_ref, scale, ref_offsets, ref_visible, mask,
            text_keys, ref_keys, groups, kt_token, vt_token, kr_token, vr_token,
            scale_group, mask_group, mask_query,
            TOKENS, D, D0, D1, SCALE, PRECISION, UPCAST, BLOCK_M, BLOCK_N, PIECE == 8,
        )  # fmt: skip
    else:
        out0, out1 = _online(
            q0, q1, query, keep, k_text, v_text, k_ref, v_ref, scale, ref_offsets, ref_visible, mask,
            text_keys, ref_keys, groups, kt_token, vt_token, kr_token, vr_token,
            scale_group, mask_group, mask_query,
            TOKENS, D, D0, D1, SCALE, PRECISION, UPCAST, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    out += row * out_row * PIECE + start * out_token + head * D
    store_rows(out + step * out_token, keep, out0, out1, D, D0, D1)


@functools.cache
def ways(capability: int, bits: int, width: int, queries: int) -> tuple[dict[str, Any], ...]:
    """Launch settings that calls of these widths may use: the one tile's, where there is one, and the loop's."""
    one_tile = lookup(CONFIGS, capability, "one_tile", bits, width, queries)
    online = lookup(CONFIGS, capability, "online", bits, width, queries)
    assert online is not None, "default.json has a rule for everything"
    looped = {"ONE_TILE": False, **online}
    return (looped,) if one_tile is None else ({"ONE_TILE": True, **one_tile}, looped)


def settings(capability: int, bits: int, width: int, queries: int, keys: int) -> dict[str, Any]:
    """Launch settings for compute capability 80, 90, ..., element bits, head width, L and the sum of all keys."""
    first, *_, last = (*ways(capability, bits, width, queries),) * 2
    return first if first["ONE_TILE"] and keys <= first["BLOCK_N"] else last


def arguments(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    scale: Tensor,
    ref_offsets: Tensor | None,
    ref_visible: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
) -> tuple[list, int]:
    """The kernel's arguments up to its constants, in order, and PIECE."""
    rows, queries = q.shape[:2]
    groups = 0 if k_ref.shape[1] == 0 else 1 if ref_offsets is None else ref_offsets.shape[0] - 1
    tensors = [q, k_text.expand(rows, -1, -1, -1), v_text.expand(rows, -1, -1, -1), k_ref, v_ref, out]
    strides = [stride for x in tensors for stride in x.stride()[:3]][:-1]
    piece = pieces(*strides, *(x.data_ptr() // x.element_size() for x in tensors))
    weights = scale.expand(rows, scale.shape[-1] if scale.dim() else 1)
    if ref_visible is not None:
        ref_visible = ref_visible.contiguous()
    visible_row = 0 if ref_visible is None else ref_visible.shape[1]
    if ref_offsets is not None:
        ref_offsets = ref_offsets.contiguous()
    mask_strides = (0, 0, 0) if mask is None else mask.expand(rows, -1, -1).stride()
    pointers = [q, k_text, v_text, k_ref, v_ref, scale, ref_offsets, ref_visible, mask, out]
    sizes = [queries, k_text.shape[1], k_ref.shape[1], k_ref.shape[0], groups]
    return [
        *pointers,
        *sizes,
        *(stride // piece for stride in strides),
        *weights.stride(),
        visible_row,
        *mask_strides,
    ], piece


def constants(width: int, tokens_per_ref: int, dtype: torch.dtype, piece: int) -> dict[str, object]:
    """The kernel's compile-time arguments, its launch settings aside."""
    first, second = split(width)
    return {
        "TOKENS": tokens_per_ref,
        "D": width,
        "D0": first,
        "D1": second,
        "SCALE": LOG2_E / width**0.5,
        "PIECE": piece,
        "UPCAST": choice.interpreted() and dtype == torch.bfloat16,
    }


_compiled: set[tuple] = set()


def _compile_all(passed: list, fixed: dict[str, object], launches: tuple[dict[str, Any], ...]) -> None:
    """Compiles every way once per kind of call, so that a longer story finds its binary and never waits for one."""
    kinds = [(x.dtype, x.device, x.data_ptr() % 16) if isinstance(x, Tensor) else None for x in passed]
    key = (*kinds, *fixed.values(), len(launches), *launches[-1].values())
    if key not in _compiled:
        for launch in launches:
            grca_kernel.warmup(*passed, grid=(1,), **fixed, **launch)
        _compiled.add(key)


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
) -> Tensor:
    """Launches the kernel. Arguments, shapes and result as `fastory.kernels.grca.grca`, which validates them.

    d is a multiple of 8 up to 256; float16, bfloat16 or float32. On a CPU it runs in Triton's interpreter.
    """
    rows, queries, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    passed, piece = arguments(q, k_text, v_text, k_ref, v_ref, scale, ref_offsets, ref_visible, mask, out)
    known = (capability(q.device), 8 * q.element_size(), width, queries)
    launch = settings(*known, k_text.shape[1] + k_ref.shape[1])
    fixed = constants(width, tokens_per_ref, q.dtype, piece)
    grid = (heads, triton.cdiv(queries, launch["BLOCK_M"]), rows)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        if not choice.interpreted():
            _compile_all(passed, fixed, ways(*known))
        grca_kernel[grid](*passed, **fixed, **launch)
    return out
