"""What single settings take: numbers within limits, pairs of them, a window."""

from __future__ import annotations

import math
from typing import Any

from fastory.errors import InputError
from fastory.wording import shown

SEED_LIMIT = 2**63
MOST_SCALE = 10  # of references; an IP-Adapter is trained at 1
LEAST = {
    "iterations": 0,
    "steps": 1,
    "inner_steps": 0,
    "cache_interval": 1,
    "reference_rise": 0,
    "reference_start": 0,
    "cast_limit": 0,
    "drafts": 0,
    "bank": 1,
    "seed": 0,
    "width": 8,
    "height": 8,
}
MOST = {
    "iterations": 1000,
    "steps": 1000,
    "inner_steps": 1000,
    "cache_interval": 1000,
    "reference_rise": 1000,
    "reference_start": 1000,
    "cast_limit": 10_000,
    "drafts": 100,
    "bank": 1000,
    "seed": SEED_LIMIT - 1,
    "width": 8192,
    "height": 8192,
}

# Numbers that may be fractions; NaN is within nothing.
WITHIN = {
    "guidance_scale": (0, 100),
    "tolerance": (0, 2),
    "restart": (0.01, 1),
    "reference_momentum": (0, 0.99),
    "reference_saturation": (0, 4),
    "sampling_rate": (0, 1),
}


def as_float(number: Any) -> float:
    """The nearest float, infinity for an integer beyond all."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _pair(value: Any) -> list[float]:
    """The numbers of FIRST:LAST, of one number, or of a pair; anything else gives none."""
    parts = (
        value.split(":") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    )
    try:
        return [as_float(part) for part in parts]
    except (TypeError, ValueError):
        return []


def scale(value: Any, what: str) -> tuple[float, float]:
    """l_1 and l_K from 0.3:0.5, from one number, or from a pair."""
    numbers = _pair(value)
    if len(numbers) not in (1, 2) or not all(math.isfinite(number) for number in numbers):
        raise InputError(f"{what}: wanted FIRST:LAST such as 0.3:0.5, or one number, got {shown(value)}")
    if not all(0 <= number <= MOST_SCALE for number in numbers):
        raise InputError(f"{what}: wanted 0 to {MOST_SCALE} for both, got {shown(value)}")
    return numbers[0], numbers[-1]


def interval(value: Any, what: str) -> tuple[float, float]:
    """Start and end as shares of the steps."""
    numbers = _pair(value)
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1] <= 1:
        raise InputError(
            f"{what}: wanted START:END such as 0.2:0.8, shares of the steps with 0 <= START < END <= 1, got {shown(value)}"
        )
    return numbers[0], numbers[1]


def window(value: Any, what: str) -> int | str:
    """L_M: a number of frames from 1 on, or "all"."""
    if value == "all":
        return "all"
    digits = isinstance(value, str) and value.isdecimal() and len(value) < 10
    number = int(value) if digits else value
    if type(number) is not int or not 1 <= number <= 1000:
        raise InputError(f"{what}: wanted 1 to 1000 frames, or all, got {shown(value)}")
    return number


def refuse_broken_text(text: str, what: str) -> None:
    """InputError, which begins with `what`, for text that no file in UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no UTF-8, or half of a UTF-16 pair
        raise InputError(f"{what}: wanted text in UTF-8, got {text[:60]!a}") from None
