"""Which seed the noise of a frame is drawn from."""

from __future__ import annotations

import hashlib

from fastory.settings import Settings


def frame_seed(
    own: int | None, redraw_seed: int | None, settings: Settings, frame: int, round: int = 0
) -> int:
    """The seed of a frame's noise, by the first that is given: --redraw-seed, the frame's own, the run's."""
    if redraw_seed is not None:
        return noise_seed(None, redraw_seed, settings.noise, frame, round)
    return noise_seed(own, settings.seed, settings.noise, frame, round)


def noise_seed(own: int | None, seed: int, noise: str, frame: int, round: int = 0) -> int:
    """The generator's seed: the frame's own; else `seed` (shared), or the first 8 bytes of sha256("seed:frame").

    From round 1 on noise `per-round` is another one in each: the first 8 bytes of sha256("that seed:round").
    """
    first = own
    if first is None:
        first = seed if noise == "shared" else _hashed(f"{seed}:{frame}")
    return _hashed(f"{first}:{round}") if noise == "per-round" and round else first


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
