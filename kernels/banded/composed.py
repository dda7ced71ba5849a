"""Local causal attention as one masked attention: CPU path, fallback, backward."""

from __future__ import annotations

from torch import Tensor

from fastory.kernels.attend import Attend
from fastory.kernels.banded.reference import band


def _reached(keys: int, group_size: int, window: int, query_group: int, prefix: int) -> tuple[int, int]:
    """First and last (exclusive) history key, counted after the prefix, that query_group reaches."""
    last = min((query_group + 1) * group_size, keys - prefix)
    first = max(query_group + 1 - window, 0) * group_size if window > 0 else 0
    return min(first, last), last


def banded_composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    window: int,
    query_group: int,
    query_group_size: int | None,
    key_padding: Tensor | None,
    prefix: int,
    attend: Attend,
) -> Tensor:
    """The operator as one call of `attend`, differentiable. Arguments as the public function's.

    Where every query stands in one group (the UNet's call) its band is a slice of the keys and needs no mask.
    """
    if query_group_size == 0 and k.shape[1] > 0:
        first, last = _reached(k.shape[1], group_size, window, query_group, prefix)
        if first == 0 or prefix == 0:
            inside = slice(first, prefix + last)
            padding = None if key_padding is None else ~key_padding[:, None, None, inside]
            return attend(q, k[:, inside], v[:, inside], padding).contiguous()
    visible = band(
        q.shape[1], k.shape[1], group_size, window, query_group, query_group_size, prefix, q.device
    )[None, None]
    if key_padding is not None:
        visible = visible & ~key_padding[:, None, None, :]
    return attend(q, k, v, visible).contiguous()
