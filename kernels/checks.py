"""The words of a refusal: name, wanted, got. Shapes and types only; no check reads a tensor's values."""

from __future__ import annotations

from torch import Tensor


def refusal(name: str, wanted: str, got: object) -> ValueError:
    """The error that says which argument, what was wanted and what came."""
    return ValueError(f"{name}: wanted {wanted}, got {got}")


def check_queries(q: Tensor) -> None:
    """Raises ValueError unless q is a floating-point (B, L, H, d) with d contiguous."""
    if q.dim() != 4:
        raise refusal("q", "(B, L, H, d)", tuple(q.shape))
    if not q.is_floating_point():
        raise refusal("q.dtype", "a floating-point type", q.dtype)
    if q.stride(-1) != 1:
        raise refusal("q.stride(-1)", "1 (contiguous over d)", q.stride(-1))


def check_keys(names: tuple[str, str], k: Tensor, v: Tensor, q: Tensor, wanted: str) -> None:
    """Raises ValueError unless k and v are (rows, keys, H, d) alike, with q's heads, type and device.

    `wanted` describes the shape in words; how many rows are right is the caller's to check.
    """
    if k.dim() != 4 or k.shape[2:] != q.shape[2:]:
        raise refusal(names[0], f"{wanted} with (H, d) = {tuple(q.shape[2:])}", tuple(k.shape))
    if v.shape != k.shape:
        raise refusal(names[1], f"{tuple(k.shape)} as {names[0]}", tuple(v.shape))
    for name, x in zip(names, (k, v), strict=True):
        check_like(name, x, q)
        if x.stride(-1) != 1:
            raise refusal(f"{name}.stride(-1)", "1 (contiguous over d)", x.stride(-1))


def check_like(name: str, x: Tensor, q: Tensor) -> None:
    """Raises ValueError unless x shares q's dtype and device."""
    if x.dtype != q.dtype:
        raise refusal(f"{name}.dtype", f"{q.dtype} as q", x.dtype)
    check_device(name, x, q)


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    """Raises ValueError unless x lies on q's device."""
    if x.device != q.device:
        raise refusal(f"{name}.device", f"{q.device} as q", x.device)
