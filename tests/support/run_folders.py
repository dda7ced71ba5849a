"""Short runs into folders, and what such a folder holds: shared by the tests of run folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastory import Story, StoryModel, generate
from fastory.events import Event, FrameDrawn, StepDone
from fastory.runs.manifest import manifest_bytes

CAPTIONS = [
    "a fox is sleeping in the snow",
    "a fox is jumping in the forest",
    "a fox is standing on the beach",
]
FEW: dict[str, Any] = {"steps": 2, "iterations": 2, "references_from": "last"}


def draw(story: Story, model: StoryModel, folder: Path, **options: Any) -> list[Event]:
    """All events of a run of few steps, two frames at once."""
    return list(generate(story, model=model, output=folder, batch_size=2, **{**FEW, **options}))


def drawn(events: list[Event]) -> set[tuple[int, int]]:
    """The (round, frame) that were drawn."""
    return {(event.round, event.frame) for event in events if isinstance(event, FrameDrawn)}


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file but the lock; the manifest without its seconds, and without the checksum that covers them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name == ".lock":
            continue
        data = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(data)
            manifest.pop("checksum", None)
            for pictures in (manifest["pictures"], manifest.get("redraw", {}).get("pictures", {})):
                for records in pictures.values():
                    for record in records.values():
                        del record["seconds"]
            data = json.dumps(manifest, sort_keys=True).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def end_and_resume(story: Story, folder: Path, last: Callable[[Event], bool], **given: Any) -> None:
    """A run that ends behind the first event of which `last` is true, and goes on by the same call."""
    events = generate(story, output=folder, **given)
    assert any(last(event) for event in events)
    events.close()
    list(generate(story, output=folder, **given))


def is_picture(round: int, frame: int) -> Callable[[Event], bool]:
    """Whether an event is that picture, drawn."""
    return lambda event: isinstance(event, FrameDrawn) and (event.round, event.frame) == (round, frame)


def is_step(round: int, frames: tuple[int, ...]) -> Callable[[Event], bool]:
    """Whether an event is a step of that round's micro-batch."""
    return lambda event: isinstance(event, StepDone) and (event.round, event.frames) == (round, frames)


def redraw_one(story: Story, frame: int, folder: Path, **given: Any) -> tuple[set[tuple[int, int]], set[int]]:
    """Draw a story, then one of its frames anew: the (round, frame) drawn then, and the frames whose pictures changed."""
    list(generate(story, output=folder, **given))
    before = contents(folder)
    events = list(generate(story, output=folder, frames=[frame], redraw_seed=7, **given))
    after = contents(folder)
    pictures = [name for name in before if name.startswith("iteration-")]
    return drawn(events), {int(name[-7:-4]) for name in pictures if after[name] != before[name]}


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as a version of fastory would have written it: with the right checksum."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    edit(manifest)
    path.write_bytes(manifest_bytes(manifest))
