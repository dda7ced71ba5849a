"""A redraw taken back: the pictures that it replaced come from history/ to their places, and what it drew goes there.

It is a redraw whose pictures are drawn already, and keeps to the order of one: a kill at any moment leaves the run as it was,
with a redraw that is not finished, or the redraw taken back. Frames that it appended leave the story; taking that back has
them again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from fastory.errors import FastoryError, InputError
from fastory.runs.folder import RunFolder
from fastory.runs.identity import Identity
from fastory.runs.manifest import numbers_of, settings_of
from fastory.runs.redraw import end_redraw, finish_move
from fastory.story import Frame, Story
from fastory.wording import numbers_listed, shown


@dataclass(frozen=True)
class GivenPictures:
    """The pictures that a story was given before a redraw changed them. references: of characters, by name."""

    references: Mapping[str, tuple[Path, ...]]
    first_frame: Path | None = None

    def put_into(self, story: Story) -> Story:
        """The story with these in place of its own."""
        cast = tuple(
            replace(character, references=self.references.get(character.name, character.references))
            for character in story.characters
        )
        return replace(story, characters=cast, first_frame=self.first_frame)


def take_back(
    path: Path,
    number: str,
    frames: Mapping[int, Frame],
    seeds: Mapping[int, int | None],
    *,
    casts: Mapping[int, str] | None = None,
    given_pictures: GivenPictures | None = None,
) -> bool:
    """Put the pictures of history/NUMBER back. False where they are in their places already.

    frames: what the replaced frames said before that redraw; seeds: their redraw seeds then, None for none. Frames that it
    appended are not among them, and leave the story. casts: what the manifest said that they were drawn with, where that is
    known; given_pictures: the story's own before a redraw that changed them. The run is drawn to its end afterwards, which
    makes its final pictures, sheet and storybook anew and draws nothing. Raises InputError for a redraw that is none, for
    frames that others were appended to, and for a run that is not finished.
    """
    folder = RunFolder(path)
    try:
        if not folder.read():
            raise InputError(f"there is no run in {path}")
        finish_move(folder)
        names = folder.manifest.get("history", {}).get(number, [])
        added = folder.manifest.get("appended", {}).get(number)
        replaced = sorted({numbers_of(name)[1] for name in names})
        if (not names and added is None) or replaced != sorted(frames):
            raise InputError(
                f"{path} has no redraw {shown(number)} of frames {numbers_listed(sorted(frames))}"
            )
        appended = added or []
        now = Story.read(path / "story.yaml")
        earlier = {name: (path / "history" / number / name).read_bytes() for name in names}
        if not appended and all(_sha256(data) == _recorded(folder, name) for name, data in earlier.items()):
            return False
        story = replace(now, frames=_frames_before(folder, now.frames, frames, appended))
        story = given_pictures.put_into(story) if given_pictures else story
        _stage(folder, story, earlier, _wanted(folder, story, frames, seeds, casts or {}, appended))
        return True
    except OSError as error:
        raise FastoryError(f"{path}: a picture of history/{number} cannot be read: {error}") from error
    finally:
        folder.close()


def _wanted(
    folder: RunFolder,
    story: Story,
    frames: Mapping[int, Frame],
    seeds: Mapping[int, int | None],
    casts: Mapping[int, str],
    appended: Sequence[int],
) -> dict[str, Any]:
    """The redraw as a manifest says it."""
    manifest = folder.manifest
    record = Identity.of(story, settings_of(manifest), {}, None).record_after(manifest, frames)
    record["casts"] = [casts.get(i, cast) if i in frames else cast for i, cast in enumerate(record["casts"])]
    return {
        "frames": sorted([*frames, *appended]),
        "story": record,
        "seeds": {str(i): seed for i, seed in seeds.items() if seed is not None},
        "dropped_seeds": [
            str(i) for i, seed in seeds.items() if seed is None and str(i) in manifest["seeds"]
        ],
        "dropped_frames": list(appended),
    }


def _stage(folder: RunFolder, story: Story, earlier: Mapping[str, bytes], wanted: Mapping[str, Any]) -> None:
    """Record the redraw, write its pictures, move them in."""
    manifest = folder.manifest
    pending = manifest.get("redraw")
    if pending is None and not manifest["products"]:
        raise InputError(f"{folder.path} is not finished; draw it to its end first")
    if pending is not None and {name: pending.get(name, []) for name in wanted} != wanted:
        raise InputError(
            f"{folder.path} has another redraw that is not finished; finish it or give it up first"
        )
    folder.check_free({**manifest, "story": wanted["story"]})
    manifest["redraw"] = {**wanted, "pictures": {}}
    folder.trust_nothing()
    folder.save_manifest()
    for name, data in earlier.items():
        digest = folder.write(f"redraw/{name}", data)
        record = {"sha256": digest, "seconds": 0.0, **_said_by(folder.path / "redraw" / name)}
        round, frame = map(str, numbers_of(name))
        manifest["redraw"]["pictures"].setdefault(round, {})[frame] = record
    end_redraw(folder, story)


def _frames_before(
    folder: RunFolder, now: Sequence[Frame], frames: Mapping[int, Frame], appended: Sequence[int]
) -> tuple[Frame, ...]:
    """What the story said before the redraw. InputError where the frames between would be missing, or others are last."""
    count = len(now) - len(appended)
    last = list(range(count, len(now)))
    back = sorted(i for i in frames if i >= count)
    if list(appended) != last:
        raise InputError(
            f"{folder.path}: frames {numbers_listed(sorted({*last, *appended} - {*appended}))} were appended after frames "
            f"{numbers_listed(appended)}; take these back first"
        )
    if back != list(range(count, count + len(back))):
        raise InputError(
            f"{folder.path} has {len(now)} frames, and frames {numbers_listed(back)} cannot come after them; take back first "
            "what was taken back last"
        )
    return (*(frames.get(i, frame) for i, frame in enumerate(now[:count])), *(frames[i] for i in back))


def _said_by(file: Path) -> dict[str, Any]:
    """The seed of a picture of ours and why it is left out as a reference, as its `fastory` chunk says."""
    with Image.open(file, formats=("PNG",)) as image:
        values = json.loads(image.text["fastory"])  # type: ignore[attr-defined]
    return {"seed": values["seed"], "left_out": values["left_out"]}


def _recorded(folder: RunFolder, name: str) -> str | None:
    """The sha256 of the picture that has this name now."""
    round, frame = map(str, numbers_of(name))
    record: Mapping[str, str] = folder.manifest["pictures"].get(round, {}).get(frame, {})
    return record.get("sha256")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
