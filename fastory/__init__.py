"""fastory: a list of captions in, a consistent sequence of pictures out.

    from fastory import draw

    draw(["a rabbit is reading a book", "a rabbit is sleeping"]).images

`generate` yields what happens instead, as events (fastory.events.Event); a FrameDrawn holds a picture. Nothing is written
without `output`.

On a CPU with other work, start Python with OMP_WAIT_POLICY=PASSIVE in its environment, as the `fastory` command does:
PyTorch reads it when it is loaded, and a library does not change its user's process.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastory.errors import FastoryError, InputError
    from fastory.events import Event
    from fastory.models.torch_model import StoryModel
    from fastory.processors.stock import install, uninstall
    from fastory.runs.generate import generate
    from fastory.runs.result import Drawing, draw
    from fastory.settings import PRESETS, Settings
    from fastory.story import Character, Frame, Story

__all__ = [
    "PRESETS",
    "Character",
    "Drawing",
    "Event",
    "FastoryError",
    "Frame",
    "InputError",
    "Settings",
    "Story",
    "StoryModel",
    "draw",
    "generate",
    "install",
    "uninstall",
]

if sys.argv[:1] == ["-m"]:  # until the module of `python -m` is found
    from fastory.threads import is_ours, wait_passively

    if is_ours(sys.orig_argv):
        wait_passively()

_ROOMS = {
    "Event": "events",
    "FastoryError": "errors",
    "InputError": "errors",
    "StoryModel": "models.torch_model",
    "Drawing": "runs.result",
    "draw": "runs.result",
    "generate": "runs.generate",
    "install": "processors.stock",
    "uninstall": "processors.stock",
    "PRESETS": "settings",
    "Settings": "settings",
    "Character": "story",
    "Frame": "story",
    "Story": "story",
}


def __getattr__(name: str) -> object:
    """Load on first use: `fastory --help` need not import PyTorch and diffusers."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'fastory' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fastory.{_ROOMS[name]}"), name)
