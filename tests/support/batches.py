"""Stories of a batch, and what its folder and its lines say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CAPTIONS = ["a cat is sleeping in the snow", "a fox is jumping", "a bear", "a rabbit in the forest", "a fox"]
FEW = ["--steps=2", "--iterations=1", "--references-from=last", "--batch-size=2", "--device=cpu"]


def write_batch(folder: Path, count: int, frames: int = 2) -> list[Path]:
    """Story files of captions that differ."""
    folder.mkdir(exist_ok=True)
    written = []
    for number in range(count):
        captions = [CAPTIONS[(number + i) % len(CAPTIONS)] for i in range(frames)]
        written.append(folder / f"story-{number}.txt")
        written[-1].write_text("\n".join(captions) + "\n", encoding="utf-8")
    return written


def files_of(run: Path) -> dict[str, str]:
    """sha256 of every file of a run but its lock and its manifest, which holds seconds."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in (".lock", "manifest.json")
    }


def runs_of(batch: Path) -> dict[str, dict[str, str]]:
    """Every run folder of a batch by the name of its story's file, with what files_of says of it."""
    return {path.name[:-9]: files_of(path) for path in sorted(batch.iterdir()) if path.is_dir()}


def states(batch: Path) -> list[str]:
    """Of its stories, as batch.json has them."""
    stories = json.loads((batch / "batch.json").read_text(encoding="utf-8"))["stories"]
    return [stories[name]["state"] for name in sorted(stories)]


def events_of(out: str, *kinds: str) -> list[dict[str, Any]]:
    """Events of these kinds among lines of JSON."""
    events = [json.loads(line) for line in out.splitlines()]
    return [event for event in events if event["event"] in kinds]


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """`python -m fastory ARGUMENTS`, one thread of PyTorch."""
    import os

    return subprocess.Popen(
        [sys.executable, "-m", "fastory", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def wait_for(process: subprocess.Popen[str], kind: str) -> dict[str, Any]:
    """The next event of a kind that a command with --json prints."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == kind:
            return dict(event)
    assert process.stderr is not None
    raise AssertionError(f"ended without a {kind}: {process.stderr.read()}")
