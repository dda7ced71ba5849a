"""kill -9 at any moment, then the same command: the bytes of an uninterrupted run, and never half a file."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from run_folders import contents

COMMAND = ["generate", "--steps", "3", "--iterations", "2", "--batch-size", "3", "--json", "--seed", "4"]
STORY = (
    "a cat is sleeping in the snow\na cat is jumping\na cat and a fox are standing\na fox is reading a book\n"
)


def start(cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastory.cli", *COMMAND, "--output", "run", "story.txt"],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(cwd: Path) -> int:
    """Run to the end; the number of events."""
    process = start(cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return len(out.splitlines())


def kill_after(cwd: Path, events: int, delay: float) -> None:
    process = start(cwd)
    assert process.stdout is not None
    for _ in range(events):
        process.stdout.readline()
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=60)


def assert_no_half_files(run: Path) -> None:
    for path in run.rglob("*.png"):
        if ".partial" not in path.name:
            with Image.open(path) as image:
                image.load()
    storybook = run / "storybook.html"
    assert not storybook.exists() or storybook.read_text(encoding="utf-8").rstrip().endswith("</html>")


def check_kills(tmp_path: Path, kills: int, seed: int) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "story.txt").write_text(STORY)
    events = finish(tmp_path / "whole")
    expected, dice = contents(tmp_path / "whole" / "run"), random.Random(seed)
    for n in range(kills):
        cwd = tmp_path / f"killed-{n}"
        cwd.mkdir()
        (cwd / "story.txt").write_text(STORY)
        kill_after(cwd, dice.randrange(events), dice.random() * 0.05)
        assert_no_half_files(cwd / "run")
        finish(cwd)
        assert contents(cwd / "run") == expected


def test_a_kill(tmp_path: Path) -> None:
    check_kills(tmp_path, 1, seed=int(time.time()))


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    check_kills(tmp_path, 20, seed=int(time.time()))


def test_second_process_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    first = start(tmp_path)
    assert first.stdout is not None
    first.stdout.readline()
    first.send_signal(signal.SIGSTOP)  # else it may be done before the second has started
    second = start(tmp_path)
    _, err = second.communicate(timeout=120)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1 and "another process" in err and "Traceback" not in err
    first.communicate(timeout=300)
    assert first.returncode == 0


def test_ctrl_c_leaves_a_resumable_folder_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    process = start(tmp_path)
    assert process.stdout is not None
    for _ in range(8):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "same command" in err and "Traceback" not in err
    finish(tmp_path)
