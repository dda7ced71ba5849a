"""What a mode asks of pictures that exist already."""

from __future__ import annotations

from typing import Protocol

from PIL import Image


class Finished(Protocol):
    """Pictures of this story that exist already: of an interrupted run, or those that a redraw leaves alone."""

    def has(self, round: int, frame: int) -> bool:
        """True where the picture of `frame` in `round` need not be drawn."""

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        """That picture, and why it is left out as a reference (None where it is not)."""


class Nothing:
    """No picture exists yet."""

    def has(self, round: int, frame: int) -> bool:
        """False."""
        return False

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        """Nothing to load."""
        raise KeyError((round, frame))
