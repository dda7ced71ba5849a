"""However a command ends, the user reads one line, not a traceback: Ctrl-C, a full stdout, what a library raises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fastory.cli import app, reporting
from fastory.errors import InputError
from fastory.wording import counted, last_words, shown

QUICK = ["--steps", "1", "--iterations", "1"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("a fox is sleeping in the snow\na cat is jumping in the snow\n")


def start(*arguments: str, **how) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True, **how)


# -- Ctrl-C


@pytest.mark.parametrize("module", ["fastory", "fastory.cli"])
@pytest.mark.parametrize("imported", ["typer", "rich.console", "PIL.Image", "torch"])
def test_interrupted_while_it_imports(module: str, imported: str) -> None:
    """Ctrl-C comes when a library is first asked for: before, and inside, a command."""
    Path("sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {imported!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    path = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
    process = start("-m", module, "generate", "good.txt", env={**os.environ, "PYTHONPATH": path})
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130
    assert message.startswith("stopped.") and message.count("\n") == 1, message


def test_interrupt_that_a_library_made_another_error_of() -> None:
    def work() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("numpy failed") from error

    assert ended(work) == (130, "stopped.\n")


def ended(work, **how) -> tuple[int, str]:
    """Exit code and stderr of a command that does `work`."""
    one = typer.Typer(pretty_exceptions_enable=False)

    @one.command()
    def command() -> None:
        with reporting.reported(**how):
            work()

    result = CliRunner().invoke(one, [])
    return result.exit_code, result.stderr


# -- what a library raises


def test_what_a_library_raises_is_one_line_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        raise RuntimeError("Error(s) in loading:\n\tMissing key 'a [bold]'\n\tshape mismatch [1, 2]\n")

    code, message = ended(work)
    assert code == 1
    assert message == "error: RuntimeError: shape mismatch [1, 2]; run with --debug for the traceback\n"
    monkeypatch.setattr(reporting, "debugging", True)
    code, message = ended(work)
    assert code == 1 and "Traceback (most recent call last)" in message and "in work" in message
    assert message.endswith("error: RuntimeError: shape mismatch [1, 2]\n") and "[bold]" in message


def test_exit_code_of_input_stays_2_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        raise InputError("wanted this, got that")

    assert ended(work) == (2, "error: wanted this, got that\n")
    monkeypatch.setattr(reporting, "debugging", True)
    code, message = ended(work)
    assert code == 2 and "Traceback" in message and message.endswith("error: wanted this, got that\n")


@pytest.mark.parametrize(
    "arguments",
    [["--debug", "generate", "no.txt"], ["generate", "--debug", "no.txt"], ["generate", "no.txt", "--debug"]],
)
def test_debug_stands_before_the_command_or_after_it(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "Traceback" in result.stderr and "no.txt" in result.stderr
    plain = CliRunner().invoke(app, [a for a in arguments if a != "--debug"])
    assert plain.exit_code == 2 and "Traceback" not in plain.stderr


# -- stdout on a full disk


def full(*arguments: str) -> tuple[int, str]:
    with open("/dev/full", "w") as stdout:
        process = start("-m", "fastory", *arguments, stdout=stdout)
        _, message = process.communicate(timeout=300)
    return process.returncode, message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "arguments",
    [
        ["words"],
        ["doctor"],
        ["--help"],
        ["generate", "good.txt", *QUICK, "--json"],
    ],
    ids=" ".join,
)
def test_stdout_on_a_full_disk(arguments: list[str]) -> None:
    code, message = full(*arguments)
    assert code == 1
    assert message.startswith("error: ") and "No space left on device" in message
    assert message.count("\n") == 1, message


# -- words


@pytest.mark.parametrize(
    ("typed", "near"), [("--pdf", ""), ("--step", "--steps"), ("--negative", "--negative-prompt")]
)
def test_only_near_options_are_suggested(typed: str, near: str) -> None:
    result = CliRunner().invoke(app, ["generate", typed, "1"])
    message = re.sub(r"[\s│]+", " ", result.stderr)
    assert result.exit_code == 2 and f"No such option: {typed}" in message
    assert "--drafts" not in message and near in message


def test_nouns_follow_their_number() -> None:
    assert [counted(n, "frame") for n in (0, 1, 2)] == ["0 frames", "1 frame", "2 frames"]
    assert [counted(n, "story") for n in (1, 2)] == ["1 story", "2 stories"]


def test_values_in_messages_have_an_end() -> None:
    for value in (
        "x" * 10**6,
        10**5000,
        [10**5000],
        list(range(10**5)),
        {"a": "b\nc" * 10**5},
        b"\0" * 10**5,
    ):
        assert len(shown(value)) < 100 and "\n" not in shown(value)
    assert shown(True) == "True" and shown("a'b") == '"a\'b"' and shown(12) == "12"
    assert last_words(KeyError()) == "KeyError"


def test_one_frame_and_one_round_are_no_plural() -> None:
    Path("one.txt").write_text("a fox is sleeping in the snow\n")
    result = CliRunner().invoke(app, ["generate", "one.txt", *QUICK, "-o", "run"])
    assert result.exit_code == 0, result.output
    assert "1 frame, 1 round" in result.stderr and "1 frames" not in result.stderr
    assert "1 rounds" not in result.stderr


def test_frames_of_causal_mode_are_told_where_there_is_no_bar() -> None:
    result = CliRunner().invoke(
        app, ["generate", "good.txt", "--mode", "causal", "--steps", "1", "-o", "run"]
    )
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if " drawn (" in line]
    assert [re.sub(r"[\d.]+ s$", "", line).strip() for line in lines] == [
        "frame 0 drawn (1 of 2):",
        "frame 1 drawn (2 of 2):",
    ]
    assert all(line.strip() for line in result.stderr.splitlines())


def test_free_english_on_the_builtin_model_is_one_notice() -> None:
    Path("free.txt").write_text(
        "An astronaut explores a crystal cave beneath the ocean\nThe rabit sails towards distant golden islands\n"
    )
    result = CliRunner().invoke(app, ["generate", "free.txt", *QUICK, "-o", "run"])
    notes = [line for line in result.stderr.splitlines() if "note:" in line and "know" in line]
    assert len(notes) == 1
    for said in (
        "astronaut",
        "more",
        "rabbit, turtle, fox",
        "forest",
        "sleeping",
        "fastory words",
        "--model",
    ):
        assert said in notes[0], notes[0]
    assert len(notes[0]) < 700


def test_a_list_of_captions_is_a_story() -> None:
    from fastory import generate
    from fastory.events import FrameDrawn, StoryStarted

    captions = ["a fox is sleeping in the snow", "a cat is jumping in the snow"]
    events = list(generate(captions, steps=1, iterations=0))
    assert [e.frames for e in events if isinstance(e, StoryStarted)] == [2]
    assert sum(isinstance(e, FrameDrawn) for e in events) == 2
    assert [
        e.frames for e in generate(["good.txt"], steps=1, iterations=0) if isinstance(e, StoryStarted)
    ] == [2]
    with pytest.raises(InputError, match="wanted a story file"):
        generate(["a fox is sleeping", "missing.txt"])
    with pytest.raises(InputError, match="no story"):
        generate([])


def test_a_wrong_argument_of_python_is_called_so() -> None:
    from fastory import generate

    with pytest.raises(InputError, match=r"steps \(argument\): wanted 1 to 1000, got 0"):
        generate("good.txt", steps=0)
