"""The operator fastory::grca: validation, registration with torch.library, choice of an implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastory.kernels import attend, backends
from fastory.kernels.checks import check_device, check_keys, check_queries, refusal
from fastory.kernels.grca.composed import grca_composed


def _check_rows(q: Tensor, k_text: Tensor, v_text: Tensor, k_ref: Tensor, v_ref: Tensor) -> None:
    check_queries(q)
    check_keys(("k_text", "v_text"), k_text, v_text, q, "(B or 1, Lt, H, d)")
    check_keys(("k_ref", "v_ref"), k_ref, v_ref, q, "(R, Lr, H, d)")
    rows = q.shape[0]
    if k_text.shape[0] != 1 and k_text.shape[0] != rows:
        raise refusal("k_text rows", f"1 or {rows}", k_text.shape[0])
    if k_text.shape[1] == 0:
        raise refusal("k_text", "at least one text key", tuple(k_text.shape))
    if k_ref.shape[0] == 0 or rows % k_ref.shape[0] != 0:
        raise refusal("k_ref rows", f"a divisor of {rows}, the rows of q", k_ref.shape[0])


def _check_scale(q: Tensor, scale: Tensor, ref_offsets: Tensor | None) -> int:
    """Returns the number of groups."""
    groups = 1
    if ref_offsets is not None:
        if ref_offsets.dim() != 1 or ref_offsets.shape[0] < 2:
            raise refusal("ref_offsets", "(G + 1,)", tuple(ref_offsets.shape))
        if ref_offsets.dtype not in (torch.int32, torch.int64):
            raise refusal("ref_offsets.dtype", "int32 or int64", ref_offsets.dtype)
        check_device("ref_offsets", ref_offsets, q)
        groups = ref_offsets.shape[0] - 1
    fits = scale.dim() <= 2 and (scale.dim() == 0 or scale.shape[-1] == groups)
    if not fits or (scale.dim() == 2 and scale.shape[0] != q.shape[0]):
        raise refusal("scale", f"(), ({groups},) or ({q.shape[0]}, {groups})", tuple(scale.shape))
    if not scale.is_floating_point():
        raise refusal("scale.dtype", "a floating-point type", scale.dtype)
    check_device("scale", scale, q)
    return groups


def _check_visible(q: Tensor, keys: int, tokens_per_ref: int, ref_visible: Tensor) -> None:
    if keys % tokens_per_ref != 0:
        raise refusal("k_ref", f"a multiple of tokens_per_ref={tokens_per_ref} keys", keys)
    rows, blocks = q.shape[0], keys // tokens_per_ref
    if ref_visible.dim() != 2 or ref_visible.shape[0] != rows or ref_visible.shape[1] != blocks:
        raise refusal("ref_visible", f"({rows}, {blocks})", tuple(ref_visible.shape))
    if ref_visible.dtype != torch.bool:
        raise refusal("ref_visible.dtype", "torch.bool", ref_visible.dtype)
    check_device("ref_visible", ref_visible, q)


def _check_ranges(q: Tensor, groups: int, ref_visible: Tensor | None, ref_ranges: Tensor) -> None:
    if ref_visible is None:
        raise refusal("ref_visible", "the flags that ref_ranges sum up", None)
    rows = q.shape[0]
    if ref_ranges.dim() != 3 or tuple(ref_ranges.shape) != (rows, groups, 4):
        raise refusal("ref_ranges", f"({rows}, {groups}, 4)", tuple(ref_ranges.shape))
    if ref_ranges.dtype != torch.int32:
        raise refusal("ref_ranges.dtype", "torch.int32", ref_ranges.dtype)
    check_device("ref_ranges", ref_ranges, q)


def _check_mask(q: Tensor, groups: int, mask: Tensor) -> None:
    rows, queries = q.shape[:2]
    fits = mask.dim() == 3 and mask.shape[1] == groups and mask.shape[2] == queries
    if not fits or (mask.shape[0] != 1 and mask.shape[0] != rows):
        raise refusal("mask", f"(1 or {rows}, {groups}, {queries})", tuple(mask.shape))
    if not mask.is_floating_point():
        raise refusal("mask.dtype", "a floating-point type", mask.dtype)
    check_device("mask", mask, q)


def grca(
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
    backend: str | None = None,
) -> Tensor:
    """Global reference cross-attention, grouped: text attention plus a weighted one per group of references.

        O[l] = softmax(Q[l] Kt' / sqrt d) Vt + sum_g scale_g mask_g[l] softmax(Q[l] Kg' / sqrt d) Vg

    Story-Adapter (arXiv 2410.06244), global reference cross-attention: one group, no mask is the paper's.

    q               (B, L, H, d), as diffusers has it: a view of (B, L, H*d), never transposed
    k_text, v_text  (B or 1, Lt, H, d); one row is read by every row of q
    k_ref, v_ref    (R, Lr, H, d), R a divisor of B: row b reads row b % R; Lr = 0 leaves the text attention
    scale           tensor (), (G,) or (B, G): a group's weight, on the device: a new value recompiles nothing
    ref_offsets     (G + 1,) int32 or int64, ascending from 0 to Lr: group g is keys ref_offsets[g] up to
                    ref_offsets[g + 1]; None is one group. Its values are the caller's to check
    ref_visible     (B, Lr / tokens_per_ref) bool: the references a row sees; a group of which it sees none
                    adds exactly zero
    ref_ranges      (B, G, 4) int32: what visible_ranges makes of ref_visible and ref_offsets, from who made these, so
                    that it is done once and not in every layer. Its values are the caller's to check
    mask            (B or 1, G, L), values in [0, 1]: where in the picture a group applies
    backend         triton, sdpa, xformers, reference or one registered in backends.py; None is the device's own

    k and v may have any strides over rows, tokens and heads (views of one wide tensor); d is contiguous. No
    tensor is read on the host. Returns (B, L, H, d) contiguous, in the type of q. Raises ValueError (name,
    wanted, got) for shapes, types, devices and a backend that does not take the call, RuntimeError for a backend
    that cannot run on this device.
    """
    _check_rows(q, k_text, v_text, k_ref, v_ref)
    groups = _check_scale(q, scale, ref_offsets)
    if tokens_per_ref < 1:
        raise refusal("tokens_per_ref", "1 or more", tokens_per_ref)
    if ref_visible is not None:
        _check_visible(q, k_ref.shape[1], tokens_per_ref, ref_visible)
    if ref_ranges is not None:
        _check_ranges(q, groups, ref_visible, ref_ranges)
    if mask is not None:
        _check_mask(q, groups, mask)
    keys = (k_text, v_text, k_ref, v_ref)
    who = (tokens_per_ref, ref_offsets, ref_visible, mask, ref_ranges)
    return _operator(q, *keys, scale, *who, backend)


def _run(
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
    ref_ranges: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    chosen = backends.pick(q, backend)
    options: dict[str, Any] = {
        "tokens_per_ref": tokens_per_ref,
        "ref_offsets": ref_offsets,
        "ref_visible": ref_visible,
        "mask": mask,
    }
    if chosen.reads_ranges:
        options["ref_ranges"] = ref_ranges
    return chosen.run["grca"](q, k_text, v_text, k_ref, v_ref, scale, **options)


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _save_inputs(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, tokens_per_ref, ref_offsets, ref_visible, mask, _, _ = inputs
    ctx.tokens_per_ref = tokens_per_ref
    ctx.save_for_backward(*tensors, ref_offsets, ref_visible, mask)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients through the composition, computed anew from the saved inputs."""
    *tensors, ref_offsets, ref_visible, saved_mask = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:6], ctx.needs_input_grad[9]]
    with torch.enable_grad():
        leaves: list[Any] = [
            x if x is None else x.detach().requires_grad_(n)
            for x, n in zip([*tensors, saved_mask], needs, strict=True)
        ]
        q, k_text, v_text, k_ref, v_ref, scale, mask = leaves
        out = grca_composed(
            q,
            k_text,
            v_text,
            k_ref,
            v_ref,
            scale,
            ctx.tokens_per_ref,
            ref_offsets,
            ref_visible,
            mask,
            attend=attend.sdpa,
        )
        wanted = [x for x, n in zip(leaves, needs, strict=True) if n]
        grads = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
    *first, last = [next(grads) if n else None for n in needs]
    return *first, None, None, None, last, None, None


# Library.define and not custom_op: half the cost per call, and the small model's layers are all call cost.
_library = torch.library.Library("fastory", "FRAGMENT")
_library.define(
    "grca(Tensor q, Tensor k_text, Tensor v_text, Tensor k_ref, Tensor v_ref, Tensor scale, "
    "SymInt tokens_per_ref, Tensor? ref_offsets, Tensor? ref_visible, Tensor? mask, "
    "Tensor? ref_ranges=None, str? backend=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("grca", _run, "CPU")
_library.impl("grca", _run, "CUDA")
torch.library.register_fake("fastory::grca", _fake, lib=_library)
torch.library.register_autograd("fastory::grca", _backward, setup_context=_save_inputs, lib=_library)
_operator = torch.ops.fastory.grca.default
