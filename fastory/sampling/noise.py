"""Which seed the noise of a frame is drawn from."""

from __future__ import annotations

import hashlib

from fastory.settings import Settings


def frame_seed(own: int | None, redraw_seed: int | None, settings: Settings, frame: int) -> int:
    """The seed of a frame's noise, by the first that is given: --redraw-seed, the frame's own, the run's."""
    if redraw_seed is not None:
        return noise_seed(None, redraw_seed, settings.noise, frame)
    return noise_seed(own, settings.seed, settings.noise, frame)


def noise_seed(own: int | None, seed: int, noise: str, frame: int) -> int:
    """The generator's seed: the frame's own; else `seed` (shared), or the first 8 bytes of sha256("seed:frame")."""
    if own is not None:
        return own
    if noise == "shared":
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{frame}".encode()).digest()[:8], "big")
