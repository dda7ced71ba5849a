"""The command line: one file a command.

commands.py has them together; options.py what they share, reporting.py how a command ends, progress.py what is printed while it
works. Nothing is imported before it is asked for, so that `python -m fastory.cli` meets Ctrl-C from its first import on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastory.cli.commands import app, main

__all__ = ["app", "main"]


def __getattr__(name: str) -> object:
    """The application and its entry point, on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'fastory.cli' has no attribute {name!r}")
    from fastory.cli import commands

    return getattr(commands, name)
