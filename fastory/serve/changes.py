"""Changes of a finished story: what is asked is checked, and becomes a request of the queue."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fastory.errors import InputError
from fastory.serve import bodies
from fastory.serve.checks import check_story
from fastory.serve.given_pictures import given_now, what_is_read
from fastory.serve.shelf import InUse, Shelf, is_finished


def redraw(shelf: Shelf, story: str, body: bodies.Redraw) -> dict[str, Any]:
    """The request. Raises InputError, or InUse for a locked frame or a story that is not finished, as all here."""
    frames = {change.frame: change.model_dump(exclude={"frame"}, exclude_none=True) for change in body.frames}
    _check_frames(shelf, story, frames)
    if any(change.boxes for change in body.frames):
        _check_boxes(shelf, story)
    pictures = _next_pictures(shelf, story, frames)
    changes = {str(i): change for i, change in frames.items()}
    return {
        "kind": "redraw",
        "frames": changes,
        "seed": body.seed,
        "replaces": _replaced(shelf, story, frames, pictures),
        **pictures,
    }


def append(shelf: Shelf, story: str, body: bodies.Append) -> dict[str, Any]:
    """The request: frames after those that there are."""
    manifest = _finished(shelf, story, "a finished story can go on")
    said = shelf.said(story)
    check_story({**said, "frames": [*said["frames"], *body.captions]})
    after = len(manifest["story"]["frames"])
    appended = {"after": after, "captions": body.captions}
    pictures = _next_pictures(shelf, story, ())
    replaced = _replaced(shelf, story, (), pictures)
    return {"kind": "redraw", "frames": {}, "appended": appended, "replaces": replaced, **pictures}


def take_back(shelf: Shelf, story: str, body: bodies.TakeBack) -> dict[str, Any]:
    """The request, with what the frames of that redraw said before it, where that is known; those it appended said nothing."""
    manifest = _finished(shelf, story, "frames of a finished story can be redrawn")
    before = undoable(manifest, shelf.notes(story)).get(body.number)
    if before is None:
        raise InputError(
            f"redraw {body.number} cannot be taken back: the page did not ask for it, or it is none"
        )
    count = len(manifest["story"]["frames"])
    changed = [*map(int, before), *manifest.get("appended", {}).get(body.number, ())]
    there = [frame for frame in changed if frame < count]  # others come again
    _check_frames(shelf, story, there)
    earlier = shelf.notes(story).get("given", {}).get(body.number)
    pictures = {"pictures": earlier} if earlier else {}
    replaced = _replaced(shelf, story, there, pictures)
    return {
        "kind": "take_back",
        "number": body.number,
        "before": before,
        "replaces": replaced,
        **pictures,
    }


def undoable(manifest: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Redraws that can be taken back, by their number in the history: what each of their frames said before, as notes keep it.

    Of one that appended frames and replaced none nothing need be known, whoever asked for it.
    """
    known, appended = notes.get("before", {}), manifest.get("appended", {})
    return {
        number: known.get(number, {})
        for number, names in manifest.get("history", {}).items()
        if (names and number in known) or (appended.get(number) and (number in known or not names))
    }


def _finished(shelf: Shelf, story: str, what: str) -> dict[str, Any]:
    manifest = shelf.manifest(story)
    if manifest is None or not is_finished(manifest):
        raise InUse(f"{what}: draw it to its end first")
    return manifest


def _check_frames(shelf: Shelf, story: str, frames: Collection[int]) -> None:
    """Frames that may change: those of a finished run that are there and not locked."""
    manifest = _finished(shelf, story, "frames of a finished story can be redrawn")
    count = len(manifest["story"]["frames"])
    if outside := [frame for frame in frames if not 0 <= frame < count]:
        raise InputError(f"frames: wanted 0 to {count - 1}, got {outside[0]}")
    if locked := sorted(set(frames) & set(shelf.notes(story).get("locked", ()))):
        raise InUse(f"frame {locked[0]} is locked: unlock it to redraw it")


def _check_boxes(shelf: Shelf, story: str) -> None:
    """InputError for a run that does not read boxes. One of iterative mode that was begun without regions stays so."""
    settings = (shelf.manifest(story) or {})["settings"]
    if "boxes" not in what_is_read(settings):
        raise InputError(
            "boxes: this run does not read them; in iterative mode they want two named characters, or boxes in the story's "
            "file, before it is drawn"
        )


def _next_pictures(shelf: Shelf, story: str, frames: Collection[int]) -> dict[str, Any]:
    """The request's part for pictures that the story was given. InputError for a first frame without all that go on from it."""
    pictures = shelf.notes(story).get("pictures")
    if not pictures:
        return {}
    count = len(shelf.said(story)["frames"])
    if pictures["first_frame"] is not None and len(frames) < count:
        raise InputError(
            f"all frames go on from the first, which is another picture now: redraw frames 0 to {count - 1} together"
        )
    return {"pictures": pictures}


def _replaced(shelf: Shelf, story: str, frames: Iterable[int], pictures: Mapping[str, Any]) -> dict[str, Any]:
    """What to remember for a take-back.

    before: what these frames say, their redraw seeds and what they were drawn with; given: the story's pictures, where they
    change; after: the number of the last redraw before this one.
    """
    said, manifest = shelf.said(story), shelf.manifest(story) or {}
    casts = dict(enumerate(manifest["story"].get("casts") or ()))
    before = {
        str(i): {"frame": said["frames"][i], "seed": manifest["seeds"].get(str(i)), "cast": casts.get(i)}
        for i in frames
    }
    now = given_now(said) if pictures else None
    return {"before": before, "given": now, "after": max(map(int, manifest.get("history", {})), default=0)}
