"""The operator fastory::banded_causal_attention: validation, registration with torch.library, choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastory.kernels import attend, backends
from fastory.kernels.banded.composed import banded_composed
from fastory.kernels.checks import check_device, check_keys, check_queries, refusal


def _check_band(
    k: Tensor, group_size: int, window: int, query_group: int, query_group_size: int | None, prefix: int
) -> None:
    if group_size < 1:
        raise refusal("group_size", "1 or more tokens", group_size)
    if window < 0:
        raise refusal("window", "0 (unlimited) or a number of groups", window)
    if query_group < 0:
        raise refusal("query_group", "0 or more", query_group)
    if query_group_size is not None and query_group_size < 0:
        raise refusal("query_group_size", "None, 0 or a number of queries", query_group_size)
    if prefix < 0 or prefix > k.shape[1]:
        raise refusal("prefix", f"0 .. {k.shape[1]}, the keys that came", prefix)


def _check_padding(q: Tensor, k: Tensor, key_padding: Tensor) -> None:
    rows, keys = q.shape[0], k.shape[1]
    if key_padding.dim() != 2 or key_padding.shape[0] != rows or key_padding.shape[1] != keys:
        raise refusal("key_padding", f"({rows}, {keys})", tuple(key_padding.shape))
    if key_padding.dtype != torch.bool:
        raise refusal("key_padding.dtype", "torch.bool", key_padding.dtype)
    check_device("key_padding", key_padding, q)


def banded_causal_attention(
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
    backend: str | None = None,
) -> Tensor:
    """Local causal attention: a query sees the prefix and the last `window` groups of keys up to its own.

        O = softmax(Q K' / sqrt d + M) V,  M[i, j] = 0 if group(i) - window < group(j) <= group(i), else -inf

    Causal-Story (ICASSP 2024), equation 3, for tokens in groups (a frame's tokens); the diagonal is allowed.

    q                (B, Lq, H, d); query i stands in group query_group + i // query_group_size
    k, v             (B or 1, prefix + Lk, H, d): key j >= prefix stands in group (j - prefix) // group_size
    group_size       tokens of a frame
    window           groups a query sees, its own among them; 0 is all up to its own
    query_group_size None is group_size; 0 puts every query into query_group
    key_padding      (B, prefix + Lk) bool, True where a key is padding and seen by nobody
    prefix           leading keys (the caption) that every query sees
    backend          triton, sdpa, xformers, reference or one registered in backends.py; None is the device's own

    q, k and v may have any strides over rows, tokens and heads; d is contiguous. A query that sees no key
    gives zero. Returns (B, Lq, H, d) contiguous, in the type of q. Raises ValueError (name, wanted, got), RuntimeError
    for a backend that cannot run on this device.
    """
    check_queries(q)
    check_keys(("k", "v"), k, v, q, "(B or 1, prefix + Lk, H, d)")
    if k.shape[0] != 1 and k.shape[0] != q.shape[0]:
        raise refusal("k rows", f"1 or {q.shape[0]}", k.shape[0])
    _check_band(k, group_size, window, query_group, query_group_size, prefix)
    if key_padding is not None:
        _check_padding(q, k, key_padding)
    return _operator(q, k, v, group_size, window, query_group, query_group_size, key_padding, prefix, backend)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    window: int,
    query_group: int,
    query_group_size: int | None,
    key_padding: Tensor | None,
    prefix: int,
    backend: str | None = None,
) -> Tensor:
    band: dict[str, Any] = {
        "group_size": group_size,
        "window": window,
        "query_group": query_group,
        "query_group_size": query_group_size,
        "key_padding": key_padding,
        "prefix": prefix,
    }
    return backends.pick(q, backend).run["banded_causal_attention"](q, k, v, **band)


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _save_inputs(ctx, inputs: tuple, output: Tensor) -> None:
    q, k, v, *ctx.band, key_padding, ctx.prefix, _ = inputs
    ctx.save_for_backward(q, k, v, key_padding)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and v through the composition, computed anew from the saved inputs."""
    *tensors, key_padding = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(n) for x, n in zip(tensors, needs, strict=True)]
        q, k, v = leaves
        group_size, window, query_group, query_group_size = ctx.band
        out = banded_composed(
            q,
            k,
            v,
            group_size,
            window,
            query_group,
            query_group_size,
            key_padding,
            ctx.prefix,
            attend=attend.sdpa,
        )
        wanted = [x for x, n in zip(leaves, needs, strict=True) if n]
        grads = iter(torch.autograd.grad(out, wanted, grad))
    return *(next(grads) if n else None for n in needs), *(None,) * 7


_library = torch.library.Library("fastory", "FRAGMENT")
_library.define(
    "banded_causal_attention(Tensor q, Tensor k, Tensor v, SymInt group_size, SymInt window, "
    "SymInt query_group, SymInt? query_group_size, Tensor? key_padding, SymInt prefix, str? backend=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("banded_causal_attention", _run, "CPU")
_library.impl("banded_causal_attention", _run, "CUDA")
torch.library.register_fake("fastory::banded_causal_attention", _fake, lib=_library)
torch.library.register_autograd(
    "fastory::banded_causal_attention", _backward, setup_context=_save_inputs, lib=_library
)
_operator = torch.ops.fastory.banded_causal_attention.default
