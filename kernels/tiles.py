"""What the two attention kernels share: tiles of a head, split where its width is no power of two, online softmax.

A head of width D is read as two parts, D0 = the largest power of two in D and D1 = the rest rounded up (0 for none):
40 = 32 + 16 with 8 columns masked, 80 = 64 + 16, 160 = 128 + 32. Padding to 64, 128, 256 would cost 1.6 times the
matrix work. Scores stay unscaled until the exponent, where scale * s - scale * max is one fused multiply-add.
"""

from __future__ import annotations

import triton
import triton.language as tl

SLOT: tl.constexpr = tl.constexpr(8)  # keys of a group that shares a tile with others; see by_slot


def split(width: int) -> tuple[int, int]:
    """(D0, D1) for a head of `width`; a product of tiles needs at least 16 columns."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = max(0, width - first)
    return first, max(16, 1 << (rest - 1).bit_length()) if rest else 0


def stride_divisor(*extents: int) -> int:
    """8 where every stride and every address, counted in elements, is a multiple of 8, else 1.

    Triton learns from an integer argument only whether 16 divides it, and 40 * 8 heads needs 8: strides are passed
    divided by this and multiplied in the kernel, where the compiler sees the factor and loads 16 bytes at a time.
    """
    return 8 if all(extent % 8 == 0 for extent in extents) else 1


@triton.jit
def load_part(rows, keep, FIRST: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST .. FIRST + WIDTH of the rows of width D that these pointers (n,) begin; zero outside."""
    column = FIRST + tl.arange(0, WIDTH)
    kept = keep[:, None]
    if FIRST + WIDTH > D:
        kept = kept & (column < D)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=kept, other=0.0)


@triton.jit
def load_rows(rows, keep, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The two parts of the rows at these pointers; the second is the first again, and unused, where D1 is 0."""
    x0 = load_part(rows, keep, 0, D, D0)
    x1 = x0
    if D1 > 0:
        x1 = load_part(rows, keep, D0, D, D1)
    return x0, x1


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b in float32. UPCAST is for the interpreter, which multiplies bfloat16 as bit patterns."""
    if UPCAST:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def score(q0, q1, k0, k1, D1: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """q k', unscaled, (BLOCK_M, BLOCK_N) float32."""
    s = tl.zeros((q0.shape[0], k0.shape[0]), tl.float32)
    s = multiply(q0, tl.trans(k0), s, PRECISION, UPCAST)
    if D1 > 0:
        s = multiply(q1, tl.trans(k1), s, PRECISION, UPCAST)
    return s


@triton.jit
def accumulate(p, v0, v1, acc0, acc1, D1: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """The two parts of acc + p v, p in the type of v."""
    p = p.to(v0.dtype)
    acc0 = multiply(p, v0, acc0, PRECISION, UPCAST)
    if D1 > 0:
        acc1 = multiply(p, v1, acc1, PRECISION, UPCAST)
    return acc0, acc1


@triton.jit
def empty_softmax(BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """(running maximum, running sum, first part, second part) of an online softmax that has seen no key."""
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, D1 if D1 > 0 else 16), tl.float32)
    return top, total, acc0, acc1


@triton.jit
def rescale(s, top, total, acc0, acc1, SCALE: tl.constexpr, GUARD: tl.constexpr, D1: tl.constexpr):
    """One step of the online softmax up to the product with v: (p, top, total, acc0, acc1).

    `s` holds -inf where a query does not see a key. GUARD is for rows that may have seen no key yet.
    """
    new = tl.maximum(top, tl.max(s, 1))
    shift = new * SCALE
    if GUARD:
        shift = tl.where(new == float("-inf"), 0.0, shift)
    p = tl.exp2(s * SCALE - shift[:, None])
    fade = tl.exp2(top * SCALE - shift)
    acc0 = acc0 * fade[:, None]
    if D1 > 0:
        acc1 = acc1 * fade[:, None]
    return p, new, total * fade + tl.sum(p, 1), acc0, acc1


@triton.jit
def _tile(
    q0, q1, k, v, flags, gap, gap_end, low, high, inner, inner_end, start, last, k_token, v_token,
    top, total, acc0, acc1,
    WHOLE: tl.constexpr, SEEN: tl.constexpr, TOKENS: tl.constexpr, GUARD: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys start .. start + BLOCK_N, all of them below `last` where WHOLE."""
    step = tl.arange(0, BLOCK_N)
    key = start + step
    keep = key < last
    if WHOLE:
        keep = tl.full((BLOCK_N,), 1, tl.int1)
    k0, k1 = load_rows(k + step * k_token, keep, D, D0, D1)
    s = score(q0, q1, k0, k1, D1, PRECISION, UPCAST)
    if not WHOLE:
        seen = keep
        if flags is not None:
            seen = keep & (tl.load(flags + key // TOKENS, mask=keep, other=1 - SEEN).to(tl.int32) == SEEN)
        s = tl.where(seen[None, :], s, float("-inf"))
    elif flags is not None:
        if gap is None:  # noqa: SIM114 (decided when compiling, the next one when running)
            seen = tl.load(flags + key // TOKENS).to(tl.int32) == SEEN
            s = tl.where(seen[None, :], s, float("-inf"))
        elif (start < gap_end) & (start + BLOCK_N > gap):
            seen = tl.load(flags + key // TOKENS).to(tl.int32) == SEEN
            s = tl.where(seen[None, :], s, float("-inf"))
    if low is not None:
        if inner is None:  # noqa: SIM114
            inside = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            s = tl.where(inside, s, float("-inf"))
        elif (start < inner) | (start + BLOCK_N > inner_end):
            inside = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            s = tl.where(inside, s, float("-inf"))
    p, top, total, acc0, acc1 = rescale(s, top, total, acc0, acc1, SCALE, GUARD, D1)
    v0, v1 = load_rows(v + step * v_token, keep, D, D0, D1)
    acc0, acc1 = accumulate(p, v0, v1, acc0, acc1, D1, PRECISION, UPCAST)
    return top, total, acc0, acc1


@triton.jit
def attend_keys(
    q0, q1, k, v, flags, gap, gap_end, low, high, first, last, k_token, v_token, top, total, acc0, acc1,
    SEEN: tl.constexpr, TOKENS: tl.constexpr, GUARD: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Continues an online softmax over keys first .. last of k and v.

    77 keys are one tile of 64 and one of 16, not two of 64: a score costs issue slots, which these kernels run out of
    first, and a whole tile needs no mask. A key is seen where flags[key // TOKENS] == SEEN (None: all) by the queries
    with low <= key < high, (BLOCK_M,) each (None: all). Outside gap .. gap_end every flag is known to be SEEN (None:
    nothing is known): only tiles that reach into the gap, or over the edge of a query's keys, are masked, which costs
    half as much as their softmax. GUARD is for rows that may see nothing.
    """
    whole = first + (last - first) // BLOCK_N * BLOCK_N
    inner, inner_end = None, None
    if low is not None and BLOCK_N > 16:
        inner, inner_end = tl.max(low, 0), tl.min(high, 0)
    k += first * k_token
    v += first * v_token
    for start in range(first, whole, BLOCK_N):
        top, total, acc0, acc1 = _tile(
            q0, q1, k, v, flags, gap, gap_end, low, high, inner, inner_end, start, last, k_token, v_token,
            top, total, acc0, acc1,
            True, SEEN, TOKENS, GUARD, D, D0, D1, SCALE, PRECISION, UPCAST, BLOCK_N,
        )  # fmt: skip
        k += BLOCK_N * k_token
        v += BLOCK_N * v_token
    for start in range(whole, last, 16):
        top, total, acc0, acc1 = _tile(
            q0, q1, k, v, flags, gap, gap_end, low, high, inner, inner_end, start, last, k_token, v_token,
            top, total, acc0, acc1,
            False, SEEN, TOKENS, GUARD, D, D0, D1, SCALE, PRECISION, UPCAST, 16,
        )  # fmt: skip
        k += 16 * k_token
        v += 16 * v_token
    return top, total, acc0, acc1


@triton.jit
def seen_range(flags, first, last, SEEN: tl.constexpr, BLOCK: tl.constexpr):
    """[from, to) of the entries of flags[first:last] that equal SEEN, empty (last, last) where none does."""
    lowest = last
    highest = first
    for start in range(first, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        seen = tl.load(flags + index, mask=index < last, other=1 - SEEN).to(tl.int32) == SEEN
        lowest = tl.minimum(lowest, tl.min(tl.where(seen, index, last), 0))
        highest = tl.maximum(highest, tl.max(tl.where(seen, index + 1, first), 0))
    return lowest, tl.maximum(highest, lowest)


@triton.jit
def store_part(rows, keep, x, FIRST: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Writes columns FIRST .. FIRST + WIDTH, as far as they exist, of the rows at these pointers."""
    column = FIRST + tl.arange(0, WIDTH)
    kept = keep[:, None] & (column < D)[None, :]
    tl.store(rows[:, None] + column[None, :], x.to(rows.dtype.element_ty), mask=kept)


@triton.jit
def store_rows(rows, keep, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Writes the two parts of the rows at these pointers, in the pointers' type."""
    store_part(rows, keep, x0, 0, D, D0)
    if D1 > 0:
        store_part(rows, keep, x1, D0, D, D1)


@triton.jit
def to_columns(x, SLOTS: tl.constexpr):
    """(SLOTS,) -> (8 * SLOTS,): a slot's value at each of its 8 columns; see by_slot."""
    wide = tl.reshape(x, (SLOTS // 4, 1, 4, 1))
    return tl.reshape(tl.broadcast_to(wide, (SLOTS // 4, 4, 4, 2)), (8 * SLOTS,))


@triton.jit
def by_slot(s, SLOTS: tl.constexpr):
    """(BLOCK_M, 8 * SLOTS) -> (BLOCK_M, SLOTS, 8), columns grouped by the thread that holds them.

    Of the scores that a matrix instruction leaves, a thread holds columns 2 t and 2 t + 1 of every eight, t one of four.
    A slot is 8 columns of one thread, so its maximum and sum need no exchange between threads.
    """
    s = tl.reshape(s, (s.shape[0], SLOTS // 4, 4, 4, 2))
    return tl.reshape(tl.permute(s, (0, 1, 3, 2, 4)), (s.shape[0], SLOTS, 8))


@triton.jit
def by_column(p, SLOTS: tl.constexpr):
    """The inverse of by_slot."""
    p = tl.reshape(p, (p.shape[0], SLOTS // 4, 4, 4, 2))
    return tl.reshape(tl.permute(p, (0, 1, 3, 2, 4)), (p.shape[0], 8 * SLOTS))


@triton.jit
def attend_slots(
    q0, q1, k, v, flags, first, last, gate, k_token, v_token, out0, out1,
    TOKENS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """out + sum over slots of gate * softmax attention over keys first .. last of a slot, at most 8, in one tile.

    first, last (SLOTS,); gate (BLOCK_M, SLOTS) float32. The weights are finished before the product with v, so one
    product serves all slots.
    """
    column = tl.arange(0, 8 * SLOTS)
    key = to_columns(first, SLOTS) + column // 8 % 4 * 2 + column % 2
    keep = key < to_columns(last, SLOTS)
    k0, k1 = load_rows(k + key * k_token, keep, D, D0, D1)
    s = score(q0, q1, k0, k1, D1, PRECISION, UPCAST)
    seen = keep
    if flags is not None:
        seen = keep & (tl.load(flags + key // TOKENS, mask=keep, other=0).to(tl.int32) == 1)
    s = by_slot(tl.where(seen[None, :], s, float("-inf")), SLOTS)
    top = tl.max(s, 2)
    shift = tl.where(top == float("-inf"), 0.0, top * SCALE)
    p = tl.exp2(s * SCALE - shift[:, :, None])
    total = tl.sum(p, 2)
    p = p * (gate / tl.where(total > 0.0, total, 1.0))[:, :, None]
    v0, v1 = load_rows(v + key * v_token, keep, D, D0, D1)
    return accumulate(by_column(p, SLOTS), v0, v1, out0, out1, D1, PRECISION, UPCAST)
