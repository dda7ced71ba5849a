"""What one step of a tuning is computed from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B stretches of stories with up to N frames each, and R frames to draw among them.

    ids, mask (B, N - 1, S), pixels (B, N - 1, 3, s, s): what can become history. story, index (R,): which stretch a
    drawn frame is in, and its index there, the number of frames before it. latents, noise (R, c, h, w); timesteps (R,);
    captions (R, Lt, C_x), unseen (R, Lt); dropped (R,) True for a row without conditions. window: L_M, 0 is all.
    references (B, N - 1, T, C_x): the history for an IP-Adapter, in a step that imitates it. pairs (P, 2): rows with a
    history that have the same caption and noise, of two stories. patches (R, c, h, w): what is added to the latents of a
    noisy picture, and not wanted. preserved (R,): rows that are wanted as the base predicts them.
    """

    ids: Tensor
    mask: Tensor
    pixels: Tensor
    story: Tensor
    index: Tensor
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: Tensor
    unseen: Tensor
    dropped: Tensor
    window: int
    references: Tensor | None = None
    pairs: Tensor | None = None
    patches: Tensor | None = None
    preserved: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def visible_references(batch: Batch) -> Tensor:
    """(R, B * (N - 1) + 1) bool: a row sees the frames of its window; dropped, the null reference in their place."""
    stories, before = batch.mask.shape[:2]
    frame, index = torch.arange(before, device=batch.index.device), batch.index[:, None]
    within = (frame < index) & (frame >= index - (batch.window or before))
    own = batch.story[:, None, None] == torch.arange(stories, device=frame.device)[None, :, None]
    kept = (own & within[:, None] & ~batch.dropped[:, None, None]).flatten(1)
    return torch.cat([kept, (batch.dropped & (batch.index > 0))[:, None]], 1)
