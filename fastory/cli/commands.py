"""The application: its commands together, and what every command takes."""

from __future__ import annotations

import difflib
import re
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from fastory import __version__
from fastory.cli import reporting
from fastory.cli.batch import batch
from fastory.cli.compare import compare
from fastory.cli.convert import convert
from fastory.cli.doctor import doctor
from fastory.cli.eval import evaluate
from fastory.cli.export import export
from fastory.cli.generate import generate
from fastory.cli.render import render
from fastory.cli.serve import serve
from fastory.cli.tune import tune
from fastory.cli.words import words
from fastory.threads import wait_passively
from fastory.wording import last_words


class Command(TyperCommand):
    """A command that, of the options it knows, names those alone that are near a misspelt one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """click finds --pdf near --drafts: the dashes count there."""
        try:
            return super().parse_args(ctx, with_ray_address(args))
        except Exception as error:
            if isinstance(near := getattr(error, "possibilities", None), list):
                name = getattr(error, "option_name", "").lstrip("-")
                words = {option.lstrip("-"): option for option in near}
                error.possibilities = [words[word] for word in difflib.get_close_matches(name, words)]  # type: ignore[attr-defined]
            raise


def with_ray_address(args: list[str]) -> list[str]:
    """--ray alone is the nearest cluster: what follows is its address only where it looks like HOST:PORT."""
    end = args.index("--") if "--" in args else len(args)
    said = []
    for i, arg in enumerate(args):
        following = args[i + 1] if i + 1 < end else ""
        bare = i < end and arg == "--ray" and not re.fullmatch(r"(ray://)?[^/\s]+:\d+|auto", following)
        said.append("--ray=auto" if bare else arg)
    return said


class Commands(TyperGroup):
    """The commands; --debug counts before a command's name and after it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """--debug, wherever it stands before a bare --, is the group's."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(arg for arg in args[:end] if arg != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Captions in, a consistent sequence of pictures out.",
    epilog="Exit codes: 0 done; 1 something ran out, or a library failed; 2 what was asked for cannot be done; 3 an export "
    "whose engines have to be built elsewhere; 130 stopped by Ctrl-C, and the same command goes on.",
)


def print_version(wanted: bool) -> None:
    """--version: the version on stdout, and nothing else is done."""
    if wanted:
        reporting.say(f"fastory {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What every command takes."""
    reporting.debugging = debug


for command in (generate, batch, serve, render, compare, tune, export, convert, doctor, words):
    app.command(cls=Command)(command)
app.command("eval", cls=Command)(evaluate)


def main() -> None:
    """The commands, once this module is imported; see fastory.__main__."""
    wait_passively()
    try:
        app()
    except OSError as error:  # --help into a full disk
        reporting.drop_stdout()
        reporting.stderr.print(f"[bold red]error:[/] {reporting.plain(last_words(error))}", soft_wrap=True)
        sys.exit(1)
