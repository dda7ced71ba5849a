"""How a command ends: results on stdout, and of what went wrong one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import typer
from rich.console import Console
from rich.markup import escape

from fastory.errors import FastoryError
from fastory.wording import last_words

stderr = Console(stderr=True, highlight=False)
debugging = False  # --debug: errors with their traceback
results: TextIO | None = None  # where they go while sys.stdout is another's


@contextmanager
def reported(resumable: bool = False, kept: str = "Finished pictures") -> Iterator[None]:
    """Print what a user did wrong, or what ran out, as one message; exit code 2, 1, or 130 for Ctrl-C.

    What a library raises is one line as well, exit code 1; with --debug every error's traceback stands before its line.
    """
    try:
        yield
    except typer.Exit:
        raise
    except FastoryError as error:
        raise failed(error, str(error), error.exit_code) from None
    except BrokenPipeError:
        drop_stdout()  # whoever read our lines is gone
        raise typer.Exit(1) from None
    except (Exception, KeyboardInterrupt) as error:
        if was_interrupted(error):
            hint = f" {kept} are kept; the same command goes on from them." if resumable else ""
            stderr.print(f"[bold]stopped.[/]{hint}", soft_wrap=True)
            raise typer.Exit(130) from None
        hint = "" if debugging else "; run with --debug for the traceback"
        raise failed(error, f"{last_words(error)}{hint}", 1) from None


def failed(error: BaseException, text: str, code: int) -> typer.Exit:
    """Print an error; returns what ends the command with `code`."""
    if debugging:
        stderr.print(escape("".join(traceback.format_exception(error))), soft_wrap=True, end="")
    stderr.print(f"[bold red]error:[/] {plain(text)}", soft_wrap=True)
    return typer.Exit(code)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what happened: a library that is being imported may make another error of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def say(text: str) -> None:
    """A line of results on stdout. Raises FastoryError where it cannot be written, as on a full disk."""
    try:
        typer.echo(text, file=results)
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_stdout()
        raise FastoryError(f"stdout could not be written: {error.strerror or error}") from error


def drop_stdout() -> None:
    """Keep Python from failing once more while it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), (results or sys.stdout).fileno())


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """What a library prints meanwhile, from whatever thread, goes to stderr; `say` goes to stdout as ever."""
    global results
    results, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout, results = results, None


def plain(value: object) -> str:
    """Text that rich prints as it is."""
    return escape(str(value))


def quiet_libraries() -> None:
    """Keep import-time remarks of transformers and diffusers off the user's screen; their errors still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
