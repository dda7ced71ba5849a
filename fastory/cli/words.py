"""`fastory words`: what the built-in model can be told."""

from __future__ import annotations

from fastory.cli.reporting import reported, say


def words() -> None:
    """Print the words that the built-in model knows, and sentences it draws; other models take any English."""
    with reported():
        from fastory.builtin.words import vocabulary_lines

        say("\n".join(vocabulary_lines()))
