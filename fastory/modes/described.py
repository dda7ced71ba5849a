"""Rounds and references of iterative mode as the storybook and the pictures say them."""

from __future__ import annotations

from typing import Any

from fastory.settings import Settings
from fastory.wording import counted


def rounds_described(settings: Settings) -> str:
    """How many rounds, what they see and what they take. What is as in the paper is not said."""
    first, last = settings.reference_scale
    risen = f" in round {settings.reference_rise}" if settings.reference_rise else ""
    start, end = settings.reference_ramp
    converges = settings.until == "converged"
    parts = [
        f"at most {settings.iterations}" if converges else f"{settings.iterations}",
        f"until it moves by {settings.tolerance:g}" if converges else "",
        f"reference scale {first:g} to {last:g}{risen}",
        f"times {start:g} to {end:g} within a round" if (start, end) != (1.0, 1.0) else "",
        f"references {settings.references}" + (" as drawn" if settings.references_from == "latest" else ""),
        f"momentum {settings.reference_momentum:g}" if settings.reference_momentum else "",
        "less of those that differ from most" if settings.reference_weighting == "majority" else "",
        f"in {settings.reference_saturation:g} times their saturation"
        if settings.reference_saturation != 1
        else "",
        f"{counted(settings.inner_steps, 'step')} before the last" if settings.inner_steps else "",
        f"from 2 on the last {settings.restart:g} of the steps"
        if settings.restarts(settings.iterations)
        else "",
    ]
    return ", ".join(part for part in parts if part)


def values_described(settings: Settings, round: int) -> dict[str, Any]:
    """The weight of the references in this round, which frames they were, and what is not as in the paper."""
    said: dict[str, Any] = {
        "reference_scale": settings.reference_scale_of(round),
        "references": settings.references,
        "references_from": settings.references_from if settings.references_from != "last" else None,
        "restart": settings.restart if settings.restarts(round) else None,
        "reference_momentum": settings.reference_momentum or None,
        "reference_weighting": settings.reference_weighting
        if settings.reference_weighting != "equal"
        else None,
        "reference_ramp": settings.reference_ramp if settings.reference_ramp != (1.0, 1.0) else None,
        "reference_saturation": settings.reference_saturation if settings.reference_saturation != 1 else None,
    }
    return {name: value for name, value in said.items() if value is not None}
