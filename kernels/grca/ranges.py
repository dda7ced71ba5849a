"""Which keys a row reads of a group of references: what the kernel would otherwise have to search for in every program."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_ranges(ref_visible: Tensor, ref_offsets: Tensor | None, tokens_per_ref: int) -> Tensor:
    """(B, G, 4) int32 of ref_visible (B, N) bool and ref_offsets (G + 1,), or one group: keys of a row in a group.

    [0] up to [1]: from the first that it sees to the last. [2] up to [3]: of these, from the first that it does not see
    to the last. Both are 0 up to 0 where there is none. Computed where ref_visible is; nothing is read on the host.
    """
    keys = ref_visible.shape[1] * tokens_per_ref
    key = torch.arange(keys, device=ref_visible.device)
    seen = ref_visible.repeat_interleave(tokens_per_ref, 1, output_size=keys)[:, None]
    if ref_offsets is not None:
        seen = seen & (key >= ref_offsets[:-1, None]) & (key < ref_offsets[1:, None])
    first, last = _extent(key, seen)
    gap, gap_end = _extent(key, ~seen & (key >= first[..., None]) & (key < last[..., None]))
    return torch.stack((first, last, gap, gap_end), -1).to(torch.int32)


def _extent(key: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """[from, to) around the keys that are `inside` (B, G, Lr), each (B, G); 0, 0 where none is."""
    if len(key) == 0:
        nothing = key.new_zeros(inside.shape[:-1])
        return nothing, nothing
    last = torch.where(inside, key + 1, 0).amax(-1)
    first = torch.where(inside, key, len(key)).amin(-1)
    return torch.minimum(first, last), last
