"""A model folder's settings for one mode count in that mode alone, and everything a user says overrules them."""

from __future__ import annotations

from typing import Any

import pytest

from fastory import InputError
from fastory.settings import resolve

FOLDER = {"steps": 15, "guidance_scale": 3.0, "causal": {"steps": 20, "scheduler": "euler"}}


@pytest.mark.parametrize(
    ("flags", "story", "preset", "expected"),
    [
        ({}, {}, None, ("iterative", 15, "ddim", 3.0)),
        ({"mode": "causal"}, {}, None, ("causal", 20, "euler", 3.0)),
        ({}, {"mode": "causal"}, None, ("causal", 20, "euler", 3.0)),
        ({"mode": "iterative"}, {"mode": "causal"}, None, ("iterative", 15, "ddim", 3.0)),
        ({"mode": "causal", "steps": 7}, {"scheduler": "unipc"}, None, ("causal", 7, "unipc", 3.0)),
        ({}, {}, "ar-ldm", ("causal", 250, "ddim", 6.0)),
        ({"mode": None}, {"mode": None}, None, ("iterative", 15, "ddim", 3.0)),
    ],
)
def test_the_settings_of_the_mode_that_is_drawn(
    flags: dict[str, Any], story: dict[str, Any], preset: str | None, expected: tuple[Any, ...]
) -> None:
    settings, _ = resolve(flags, story, preset, FOLDER)
    assert (settings.mode, settings.steps, settings.scheduler, settings.guidance_scale) == expected


def test_a_folder_that_draws_in_causal_mode_by_itself() -> None:
    settings, sources = resolve({}, {}, None, {**FOLDER, "mode": "causal"})
    assert (settings.mode, settings.steps, sources["steps"]) == ("causal", 20, "model")


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ("fast", r"causal \(model\): wanted settings by name, got 'fast'"),
        ({"stepps": 3}, r"unknown setting 'stepps' \(model\); did you mean 'steps'\?"),
        ({"steps": 0}, r"steps \(model\): wanted 1 to 1000, got 0"),
    ],
)
def test_what_cannot_be_settings_is_refused(own: Any, wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        resolve({"mode": "causal"}, {}, None, {"causal": own})


def test_a_mode_that_does_not_exist_is_refused_as_ever() -> None:
    with pytest.raises(InputError, match=r"wanted one of iterative, causal, .*got 'causl'"):
        resolve({"mode": "causl"}, {}, None, FOLDER)
