"""`python -m fastory`, and the entry point of the `fastory` command: imports happen where Ctrl-C is met."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Ctrl-C while it is being imported ends in one line, exit code 130."""
    try:
        from fastory.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.stderr.write("stopped.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
