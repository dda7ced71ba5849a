"""What surrounds every reading of a user's files: quiet libraries, and errors that name the files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from fastory.errors import InputError


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns what a library raises over a user's files into an InputError that begins with `what`.

    The libraries raise anything from KeyError to RuntimeError over a wrong config or a wrong tensor. Out of
    memory on a device passes through: it has its own treatment.
    """
    with ExitStack() as stack:
        stack.enter_context(_quiet(diffusers_logging))
        stack.enter_context(_quiet(transformers_logging))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        try:
            yield
        except (InputError, torch.OutOfMemoryError):
            raise
        except (
            OSError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            raise InputError(f"{what}: {type(error).__name__}: {_shortened(str(error))}") from error


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


def _shortened(message: str) -> str:
    """A library's message on one line, cut where it begins to list every key."""
    line = " ".join(message.split())
    return line if len(line) <= 300 else line[:300] + " ..."
