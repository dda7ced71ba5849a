"""When a frame is finished before its last round (the setting `until`): its pictures no longer change.

What is compared are reference tokens, all that other frames see of a picture. A frame is finished in round k where those of
rounds k - 1 and k - 2 both lie within the tolerance of round k's, so that two pictures that take turns do not count. It depends
on the frame's own pictures alone: a resumed run comes to the same rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastory.modes.drawn_rounds import LOOKED_BACK, DrawnRounds
from fastory.settings import Settings


def distance(a: Tensor, b: Tensor) -> float:
    """Cosine distance of two pictures' tokens (1, T, C_x), from 0 to 2."""
    flat = (functional.normalize(tokens.double().flatten(1), dim=1) for tokens in (a, b))
    return float(1 - (next(flat) * next(flat)).sum())


@torch.inference_mode()
def has_converged(drawn: DrawnRounds, k: int, frame: int, tolerance: float) -> bool:
    """Whether a frame is finished in round k >= 2. A picture that must not be a reference has not converged."""
    last, *before = (drawn.seen(k - back, frame).whole for back in range(LOOKED_BACK))
    return last is not None and all(
        tokens is not None and distance(last, tokens) <= tolerance for tokens in before
    )


def staying(drawn: DrawnRounds, settings: Settings, first: int, k: int, frames: int) -> dict[int, int]:
    """The frames that round k does not draw, each with the round in which it was finished. Rounds are asked for in turn.

    first: the round from which on references are what they stay, those given for characters among them. The last round draws
    all frames where it has other steps than the ones before: their pictures are read by the image encoder alone.
    """
    if settings.until != "converged" or k - LOOKED_BACK < first:
        return {}
    for i in range(frames):
        if not has_converged(drawn, k - 1, i, settings.tolerance):
            drawn.converged.pop(i, None)
        else:
            drawn.converged.setdefault(i, k - 1)
    return dict(drawn.converged) if settings.steps_of(k) == settings.steps_of(k - 1) else {}
