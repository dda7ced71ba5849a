"""The errors a user meets. Each says what was wanted, what came, and what to do."""

from __future__ import annotations


class FastoryError(Exception):
    """A message for the user. The command line prints it without a traceback and ends with `exit_code`."""

    exit_code = 1


class InputError(FastoryError):
    """Something the user gave cannot be used: a story file, an option, a model folder, a picture. Exit code 2."""

    exit_code = 2
