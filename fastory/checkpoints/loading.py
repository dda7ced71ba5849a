"""What surrounds every reading of a user's files: quiet libraries, and errors that name the files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from fastory.errors import FastoryError, InputError
from fastory.runtime import is_out_of_memory


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns what a library raises over a user's files into an InputError that begins with `what`.

    The libraries raise anything over a wrong config or a wrong tensor: KeyError, ZeroDivisionError, ImportError,
    RecursionError, and Exception itself (tokenizers). Out of memory is no fault of the files and passes through.
    """
    with ExitStack() as stack:
        stack.enter_context(_quiet(diffusers_logging))
        stack.enter_context(_quiet(transformers_logging))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        try:
            yield
        except (FastoryError, MemoryError):
            raise
        except BaseException as error:
            if (
                not isinstance(error, Exception) and type(error).__name__ != "PanicException"
            ):  # Rust's, of tokenizers
                raise
            if isinstance(error, Exception) and _out_of_memory(error):
                raise
            raise InputError(f"{what}: {type(error).__name__}: {one_line(str(error))}") from error


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Turns every way in which the libraries run out of memory into one FastoryError that says what helps."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _out_of_memory(error):
            raise
        raise FastoryError(
            f"There is not enough memory to load {what}: {one_line(str(error))}. Close other programs, or "
            "take half the size with --dtype bfloat16 (or float16 on a GPU)."
        ) from error


def _out_of_memory(error: Exception) -> bool:
    """Beside what drawing runs into, loading meets the system's own words, through mmap."""
    return is_out_of_memory(error) or "Cannot allocate memory" in str(error)


@contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """No bars over the command's own and no log lines: what matters in them is checked and raised."""
    bars, verbosity = library.is_progress_bar_enabled(), library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()


def one_line(message: str) -> str:
    """A library's message on one line, cut where it begins to list every key."""
    line = " ".join(message.split())
    if (
        "ignore_mismatched_sizes" in line and "expected shape" not in line
    ):  # transformers logs the rest as a table
        return "its weights are of other shapes than its configuration asks for"
    return line if len(line) <= 300 else line[:300] + " ..."
