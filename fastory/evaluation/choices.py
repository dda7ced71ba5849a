"""Which measures a command makes, by the words that name them, and what each of them needs. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from fastory.errors import InputError
from fastory.wording import shown

CLIP_B32 = "openai/clip-vit-base-patch32"
GROUNDING_DINO = "IDEA-Research/grounding-dino-tiny"  # Swin-T OGC
BUILTIN, BOXES, INCEPTION, ENCODER = "builtin", "boxes", "inception", "encoder"
ALL = "all"
# The words of --metrics, and the rows that each makes.
MEASURES: dict[str, tuple[str, ...]] = {
    "clip": ("clip_t", "clip_i_self"),
    "judge": ("judge_agreement", "judge_captions", "judge_distinct"),
}


def read_metrics(text: str) -> tuple[str, ...]:
    """The words of NAME,NAME..; `all` stands for every one. Raises InputError for another word."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if strange := [name for name in names if name not in (*MEASURES, ALL)]:
        raise InputError(f"--metrics: wanted {', '.join((*MEASURES, ALL))}, got {shown(strange[0])}")
    if not names:
        raise InputError(f"--metrics: wanted one or more of {', '.join((*MEASURES, ALL))}, got none")
    return tuple(MEASURES) if ALL in names else _once(names)


def _once(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
