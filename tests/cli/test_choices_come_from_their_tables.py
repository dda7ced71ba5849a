"""A word that an option takes stands in its help and is completed by the shell; both come from the table that is checked."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fastory import settings
from fastory.cli import app
from fastory.export.choices import BINDINGS
from fastory.tuning.sizes import SIZES

WIDE = {"COLUMNS": "250", "TERMINAL_WIDTH": "250"}
TABLES = {
    "generate": {
        "--mode": settings.MODES,
        "--preset": settings.PRESETS,
        "--references": settings.REFERENCES,
        "--reference-fit": settings.REFERENCE_FITS,
        "--regions": settings.choices("regions"),
        "--scheduler": settings.SCHEDULERS,
        "--noise": settings.NOISES,
        "--dtype": ("auto", *settings.DTYPES),
        "--graphs": settings.GRAPHS,
        "--attention": settings.ATTENTION,
        "--distilled": settings.DISTILLED,
    },
    "export": {"--dtype": ("auto", *settings.DTYPES), "--bind": BINDINGS},
    "tune": {"--history-size": SIZES},
}
CASES = [
    (command, name, list(words)) for command, options in TABLES.items() for name, words in options.items()
]


def completed(*typed: str) -> tuple[list[str], bool]:
    """What bash is offered behind `typed`, and whether PyTorch was imported for it."""
    script = (
        "import sys\nfrom fastory.cli import main\nsys.argv = ['fastory']\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    asked = {
        "_FASTORY_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(typed),
        "COMP_CWORD": str(len(typed) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=60,
    )
    *words, imported = done.stdout.split()
    return words, imported == "True"


@pytest.mark.parametrize("command", TABLES)
def test_help_shows_every_word(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env=WIDE).stdout
    lines = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│ --")}
    for name, words in TABLES[command].items():
        assert f" [{'|'.join(words)}] " in lines[name]


@pytest.mark.parametrize(
    ("command", "name", "words"), CASES, ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_the_shell_completes_every_word(command: str, name: str, words: list[str]) -> None:
    first = words[-1][:2]
    assert completed("fastory", command, name, first) == (
        [word for word in words if word.startswith(first)],
        False,
    )


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (("generate", "--style", "co"), ["comic"]),
        (("generate", "--window", "a"), ["all"]),
        (("tune", "--window", "r"), ["random"]),
        (("generate", "--device", "cu"), ["cuda", "cuda:0"]),
    ],
    ids=" ".join,
)
def test_the_shell_completes_words_beside_which_others_count(
    typed: tuple[str, ...], words: list[str]
) -> None:
    assert completed("fastory", *typed) == (words, False)


@pytest.mark.parametrize(
    ("command", "name", "words"), CASES, ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_another_word_is_refused_with_those_of_the_table(command: str, name: str, words: list[str]) -> None:
    needed = ["stories", "-o", "a.safetensors"] if command == "tune" else []
    done = CliRunner().invoke(app, [command, *needed, name, "nothing-of-the-kind"])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert f"wanted one of {', '.join(words)}" in done.stderr
