"""Commands that are refused."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from fastory.cli import app


def refuse(arguments: list[str], wanted: str, code: int = 2) -> str:
    """Run `fastory generate`; check the refusal; returns its message."""
    before = sorted(Path().rglob("*"))
    result = CliRunner().invoke(app, ["generate", *arguments])
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit | type(None)), result.exception
    message = re.sub(r"[\s│]+", " ", result.stderr)
    assert wanted in message, message
    assert "Traceback" not in result.output
    assert sorted(Path().rglob("*")) == before
    return message
