"""Local causal attention over groups of tokens in one pass, in Triton.

    O = softmax(Q K' / sqrt d + M) V,  M[i, j] = 0 if group(i) - window < group(j) <= group(i), else -inf

Causal-Story (ICASSP 2024), equation 3. A program computes BLOCK_M queries of one head of one row by online softmax over
the keys that one of its queries may see: the prefix, then the band from the first query's oldest group to the last
query's own. Padding at either end of the band (the empty slots of a ring) is not read.
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
from fastory.kernels.tiles import (
    attend_keys,
    empty_softmax,
    load_rows,
    seen_range,
    split,
    store_rows,
    stride_divisor,
)

CONFIGS = Path(__file__).with_name("configs")
LOG2_E = 1.4426950408889634
RUNTIME = [
    *("queries", "keys", "group_size", "window", "query_group", "query_group_size", "prefix"),
    *("q_row", "q_token", "q_head", "k_row", "k_token", "k_head", "v_row", "v_token", "v_head"),
    *("out_row", "out_token", "padding_row"),
]


@triton.jit
def _band(padding, low, high, keys, group_size, window, prefix):
    """History keys [from, to), counted from the prefix on, of groups low - window < g <= high, padding cut off."""
    last = tl.minimum((high + 1) * group_size, keys - prefix)
    oldest = tl.where(window > 0, tl.maximum(low - window + 1, 0), 0)
    first = tl.minimum(oldest * group_size, last)
    if padding is not None:
        first, last = seen_range(padding + prefix, first, last, 0, 128)
    return first, last


@triton.jit(do_not_specialize=RUNTIME)
def banded_kernel(
    q, k, v, key_padding, out,
    queries, keys, group_size, window, query_group, query_group_size, prefix,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, out_row, out_token, padding_row,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    STRIDE_DIVISOR: tl.constexpr, ONE_GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (H, ceil(Lq / BLOCK_M), B). ONE_GROUP: every query stands in query_group, so only padding needs a mask.

    Strides of q, k, v and out come divided by STRIDE_DIVISOR. Offsets to a row, a head or a token are int64.
    """
    q_token, out_token = q_token.to(tl.int64) * STRIDE_DIVISOR, out_token.to(tl.int64) * STRIDE_DIVISOR
    k_token, v_token = k_token.to(tl.int64) * STRIDE_DIVISOR, v_token.to(tl.int64) * STRIDE_DIVISOR
    head = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * BLOCK_M
    row = tl.program_id(2).to(tl.int64)
    step = tl.arange(0, BLOCK_M)
    query = start.to(tl.int32) + step
    keep = query < queries
    group = query * 0 + query_group
    if not ONE_GROUP:
        group += query // query_group_size
    if key_padding is not None:
        key_padding += row * padding_row
    first, last = _band(
        key_padding, tl.min(group, 0), tl.max(tl.where(keep, group, query_group), 0),
        keys, group_size, window, prefix,
    )  # fmt: skip
    q += (row * q_row + head * q_head) * STRIDE_DIVISOR + start * q_token
    k += (row * k_row + head * k_head) * STRIDE_DIVISOR
    v += (row * v_row + head * v_head) * STRIDE_DIVISOR
    q0, q1 = load_rows(q + step * q_token, keep, D, D0, D1)
    top, total, acc0, acc1 = empty_softmax(BLOCK_M, D0, D1)
    history = key_padding
    # All keys that are padding lie in [gap, gap_end). A tile of 16 keys is masked faster than it is looked up, and its kernels
    # (wide heads in float32) lack registers.
    gap, gap_end = None, None
    if key_padding is not None:
        if BLOCK_N > 16:
            gap, gap_end = seen_range(key_padding, prefix * 0, prefix, 1, 128)
        history = key_padding + prefix
    top, total, acc0, acc1 = attend_keys(
        q0, q1, k, v, key_padding, gap, gap_end, None, None, prefix * 0, prefix, k_token, v_token,
        top, total, acc0, acc1, 0, 1, True, D, D0, D1, SCALE, PRECISION, UPCAST, BLOCK_N,
    )  # fmt: skip
    if gap is not None:
        gap, gap_end = seen_range(history, first, last, 1, 128)
    oldest, newest = None, None
    if not ONE_GROUP:
        newest = (group + 1) * group_size
        oldest = tl.where(window > 0, tl.maximum(group - window + 1, 0), 0) * group_size
    top, total, acc0, acc1 = attend_keys(
        q0, q1, k + prefix * k_token, v + prefix * v_token, history, gap, gap_end, oldest, newest,
        first, last, k_token, v_token, top, total, acc0, acc1,
        0, 1, True, D, D0, D1, SCALE, PRECISION, UPCAST, BLOCK_N,
    )  # fmt: skip
    total = tl.where(total > 0.0, total, 1.0)[:, None]
    out += row * out_row * STRIDE_DIVISOR + start * out_token + head * D
    store_rows(out + step * out_token, keep, acc0 / total, acc1 / total, D, D0, D1)


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    window: int,
    query_group: int,
    query_group_size: int | None,
    key_padding: Tensor | None,
    prefix: int,
    out: Tensor,
) -> tuple[list, int]:
    """The kernel's arguments up to its constants, in order, and STRIDE_DIVISOR."""
    rows = q.shape[0]
    tensors = [q, k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1), out]
    strides = [stride for x in tensors for stride in x.stride()[:3]][:-1]
    divisor = stride_divisor(*strides, *(x.data_ptr() // x.element_size() for x in tensors))
    step = group_size if query_group_size is None else query_group_size
    band = [group_size, window, query_group, step, prefix]
    if key_padding is not None:
        key_padding = key_padding.contiguous()
    padding_row = 0 if key_padding is None else key_padding.shape[1]
    sizes = [q.shape[1], k.shape[1], *band]
    return [
        q,
        k,
        v,
        key_padding,
        out,
        *sizes,
        *(stride // divisor for stride in strides),
        padding_row,
    ], divisor


def constants(width: int, one_group: bool, dtype: torch.dtype, divisor: int) -> dict[str, object]:
    """The kernel's compile-time arguments, its launch settings aside."""
    first, second = split(width)
    return {
        "D": width,
        "D0": first,
        "D1": second,
        "SCALE": LOG2_E / width**0.5,
        "STRIDE_DIVISOR": divisor,
        "ONE_GROUP": one_group,
        "UPCAST": backends.interpreted() and dtype == torch.bfloat16,
    }


@functools.cache
def settings(capability: int, bits: int, width: int, queries: int) -> dict[str, Any]:
    """Launch settings for compute capability 80, 90, ..., element bits, head width and Lq."""
    return lookup(CONFIGS, capability, bits, width, queries)


def banded_triton(
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
    """Launches the kernel. Arguments, shapes and result as `banded_causal_attention`, which validates them.

    d is a multiple of 8 up to 256; float16, bfloat16 or float32. On a CPU it runs in Triton's interpreter.
    """
    rows, queries, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    passed, divisor = arguments(
        q, k, v, group_size, window, query_group, query_group_size, key_padding, prefix, out
    )
    launch = settings(capability(q.device), 8 * q.element_size(), width, queries)
    grid = (heads, triton.cdiv(queries, launch["BLOCK_M"]), rows)
    fixed = constants(width, query_group_size == 0, q.dtype, divisor)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        banded_kernel[grid](*passed, **fixed, **launch)
    return out
