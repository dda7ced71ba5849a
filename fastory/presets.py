"""Presets: published methods, each by every value that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a schedule that is no more than its rounds and steps leaves off.
_NOTHING_ELSE: Mapping[str, Any] = {
    "guidance_interval": (0.0, 1.0),
    "reference_interval": (0.0, 1.0),
    "cache_interval": 1,
    "until": "iterations",
    "restart": 1.0,
    "reference_rise": 0,
    "reference_momentum": 0.0,
    "reference_weighting": "equal",
    "reference_ramp": (1.0, 1.0),
}

_STORY_ADAPTER: Mapping[str, Any] = {
    **_NOTHING_ELSE,
    "mode": "iterative",
    "iterations": 10,
    "inner_steps": 0,
    "reference_saturation": 1.0,
    "reference_scale": (0.3, 0.5),
    "references": "all",
    "references_from": "last",
    "reference_fit": "pad",
    "regions": "off",
    "scheduler": "ddim",
    "steps": 50,
    "guidance_scale": 7.5,
    "noise": "shared",
}

# What bench/schedules.py found, a sixth and a third of the calls of Story-Adapter's 11 rounds of 50 steps: a model that is
# drawn in other steps has its share of them. What is not about the schedule, guidance, noise and how references weigh and look,
# stays its own.
_SEARCHED: Mapping[str, Any] = {
    **_NOTHING_ELSE,
    "mode": "iterative",
    "references_from": "latest",
    "scheduler": "unipc",
    "noise": "per-round",
    "reference_weighting": "majority",
}
PAPER_STEPS = 50

# A preset names every value it stands for, so that it also overrules the model folder's defaults.
# The sizes of story-iter are SDXL's own, 1024 x 1024: an SDXL folder has them without being told.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": _STORY_ADAPTER,
    "quick": {**_SEARCHED, "iterations": 5, "inner_steps": 12, "steps": 24},
    # A last round of 50 steps undoes some of what 10 rounds of 12 agreed on; in as many calls there are two rounds more.
    "best": {**_SEARCHED, "iterations": 12, "inner_steps": 12, "steps": 24, "reference_rise": 4},
    "story-iter": {
        **_STORY_ADAPTER,
        "scheduler": "ddim-leading",
        "guidance_scale": 5.0,
        "reference_fit": "squash",
    },
    "story-iter-fast": {
        **_STORY_ADAPTER,
        "scheduler": "lcm",
        "steps": 4,
        "guidance_scale": 5.0,
        "reference_fit": "squash",
    },
    "ar-ldm": {
        "mode": "causal",
        "scheduler": "ddim",
        "steps": 250,
        "guidance_scale": 6.0,
        "guidance_interval": (0.0, 1.0),
        "cache_interval": 1,
        "window": "all",
        "drafts": 0,
    },
    # With one picture as --initial-pictures every frame is drawn from it; without, from frame 0.
    "ip-adapter": {
        "mode": "reference",
        "bank": 1,
        "reference_scale": (0.6, 0.6),
        "reference_fit": "crop",
        "scheduler": "ddim",
        "steps": 50,
        "guidance_scale": 7.5,
        "guidance_interval": (0.0, 1.0),
        "cache_interval": 1,
        "reference_interval": (0.0, 1.0),
        "noise": "shared",
    },
    # What makes it fast stands in FAST, by what the checkpoint is.
    "fast": {**_STORY_ADAPTER, "scheduler": "lcm", "steps": 4, "guidance_scale": 1.0},
}

# What a checkpoint that was distilled for few steps is drawn with: as its authors do on their model cards.
FAST: Mapping[str, Mapping[str, Any]] = {
    "lcm": {"scheduler": "lcm", "steps": 4, "guidance_scale": 8.0},
    "lcm-lora": {"scheduler": "lcm", "steps": 4, "guidance_scale": 1.0},
    "turbo, euler": {"scheduler": "euler", "steps": 4, "guidance_scale": 1.0},
    "turbo, euler-ancestral": {"scheduler": "euler-ancestral", "steps": 4, "guidance_scale": 1.0},
}

# Of the presets, those whose steps are meant for a model that is drawn in PAPER_STEPS.
IN_PROPORTION = ("quick", "best")


def in_steps(preset: str, steps: int) -> Mapping[str, Any]:
    """What a preset stands for with a model that is drawn in `steps`: 7 and 4 of 15 where it says 24 and 12 of 50."""
    values = PRESETS[preset]
    if preset not in IN_PROPORTION:
        return values
    share = steps / PAPER_STEPS
    return {**values, **{name: max(1, round(values[name] * share)) for name in ("steps", "inner_steps")}}
