"""A command in somebody's notes must not stop working because a file was moved."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("train", "training.stages"),
        ("drawn_stories", "training.drawn_stories"),
        ("classifier", "evaluation.classifier"),
        ("evaluate", "evaluation.iterative"),
        ("evaluate_causal", "evaluation.causal"),
    ],
)
def test_the_old_command_runs_what_the_new_one_runs(old: str, new: str) -> None:
    then, now = (importlib.import_module(f"fastory.builtin.{name}") for name in (old, new))
    assert then.main is now.main
