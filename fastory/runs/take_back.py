"""A redraw taken back: the pictures that it replaced come from history/ to their places, and what it drew goes there.

It is a redraw whose pictures are drawn already, and keeps to the order of one: a kill at any moment leaves the run as it was,
with a redraw that is not finished, or the redraw taken back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from fastory.errors import FastoryError, InputError
from fastory.runs.folder import RunFolder
from fastory.runs.identity import Identity
from fastory.runs.manifest import settings_of
from fastory.runs.redraw import end_redraw, finish_move
from fastory.story import Frame, Story
from fastory.wording import numbers_listed, shown


def take_back(path: Path, number: str, frames: Mapping[int, Frame], seeds: Mapping[int, int | None]) -> bool:
    """Put the pictures of history/NUMBER back. False where they are in their places already.

    frames: what the replaced frames said before that redraw; seeds: their redraw seeds then, None for none. The run is drawn
    to its end afterwards, which makes its final pictures, sheet and storybook anew and draws nothing. Raises InputError for a
    redraw that is none, and for a run that is not finished.
    """
    folder = RunFolder(path)
    try:
        if not folder.read():
            raise InputError(f"there is no run in {path}")
        finish_move(folder)
        names = folder.manifest.get("history", {}).get(number)
        replaced = sorted({int(Path(name).stem.removeprefix("frame-")) for name in names or ()})
        if not names or replaced != sorted(frames):
            raise InputError(
                f"{path} has no redraw {shown(number)} of frames {numbers_listed(sorted(frames))}"
            )
        earlier = {name: (path / "history" / number / name).read_bytes() for name in names}
        if all(_sha256(data) == _record_of(folder, name)["sha256"] for name, data in earlier.items()):
            return False
        _stage(folder, earlier, frames, seeds)
        return True
    except OSError as error:
        raise FastoryError(f"{path}: a picture of history/{number} cannot be read: {error}") from error
    finally:
        folder.close()


def _stage(
    folder: RunFolder,
    earlier: Mapping[str, bytes],
    frames: Mapping[int, Frame],
    seeds: Mapping[int, int | None],
) -> None:
    """Record the redraw, write its pictures, move them in."""
    manifest, read = folder.manifest, Story.read(folder.path / "story.yaml")
    story = replace(read, frames=tuple(frames.get(i, frame) for i, frame in enumerate(read.frames)))
    wanted: dict[str, Any] = {
        "frames": sorted(frames),
        "story": Identity.of(story, settings_of(manifest), {}, None).record(),
        "seeds": {str(i): seed for i, seed in seeds.items() if seed is not None},
        "dropped_seeds": [
            str(i) for i, seed in seeds.items() if seed is None and str(i) in manifest["seeds"]
        ],
    }
    pending = manifest.get("redraw")
    if pending is None and not manifest["products"]:
        raise InputError(f"{folder.path} is not finished; draw it to its end first")
    if pending is not None and {name: pending.get(name, []) for name in wanted} != wanted:
        raise InputError(
            f"{folder.path} has another redraw that is not finished; finish it or give it up first"
        )
    manifest["redraw"] = {**wanted, "pictures": {}}
    folder.trust_nothing()
    folder.save_manifest()
    for name, data in earlier.items():
        digest = folder.write(f"redraw/{name}", data)
        record = {"sha256": digest, "seconds": 0.0, **_said_by(folder.path / "redraw" / name)}
        round, frame = _numbers(name)
        manifest["redraw"]["pictures"].setdefault(round, {})[frame] = record
    end_redraw(folder, story)


def _said_by(file: Path) -> dict[str, Any]:
    """The seed of a picture of ours and why it is left out as a reference, as its `fastory` chunk says."""
    with Image.open(file, formats=("PNG",)) as image:
        values = json.loads(image.text["fastory"])  # type: ignore[attr-defined]
    return {"seed": values["seed"], "left_out": values["left_out"]}


def _record_of(folder: RunFolder, name: str) -> Mapping[str, Any]:
    round, frame = _numbers(name)
    record: Mapping[str, Any] = folder.manifest["pictures"].get(round, {}).get(frame, {"sha256": ""})
    return record


def _numbers(name: str) -> tuple[str, str]:
    """Round and frame of a picture's name, as a manifest has them."""
    folder, file = Path(name).parts
    return str(int(folder.removeprefix("iteration-"))), str(int(Path(file).stem.removeprefix("frame-")))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
