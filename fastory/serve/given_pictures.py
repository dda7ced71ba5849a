"""Pictures that a drawn story is given: those of its characters, or its first frame. What is drawn next goes by them.

A story's notes keep them until then, as names: pictures/NAME is an upload that lies with its draft, any other is one that the
run's story file names. A redraw's request carries them, so that the run folder sees a story that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastory import files
from fastory.errors import InputError
from fastory.pictures import MemoryPicture, Picture, open_picture
from fastory.runs.take_back import GivenPictures
from fastory.serve.bodies import Given
from fastory.serve.shelf import PICTURE, InUse, Shelf, is_finished
from fastory.settings import MODES
from fastory.story import Character, Story
from fastory.wording import shown


def what_is_read(settings: object) -> list[str]:
    """What of `references`, `first_frame` and `boxes` is read under these settings; a draft's may be anything yet."""
    mode = settings.get("mode") if isinstance(settings, dict) else None
    regions = settings.get("regions", "off") if isinstance(settings, dict) else "off"
    traits = MODES[mode if isinstance(mode, str) and mode in MODES else next(iter(MODES))]
    boxes = traits.boxes or ("regions" in traits.own and regions != "off")
    read = {"references": traits.character_pictures, "first_frame": traits.first_frame, "boxes": boxes}
    return [name for name, reads in read.items() if reads]


def given_now(said: Mapping[str, Any]) -> dict[str, Any]:
    """The names that a story file's values say."""
    characters = said.get("characters") or {}
    references = {name: list((entry or {}).get("references") or ()) for name, entry in characters.items()}
    return {"references": references, "first_frame": said.get("first_frame")}


def pictures_for_next(shelf: Shelf, story: str, wanted: Given) -> dict[str, Any] | None:
    """As notes keep them, with the frames in which they count; None where the story has these already.

    Raises InputError for a mode that does not read them, a character or a picture that is none, InUse for a story that is not
    finished.
    """
    manifest = shelf.manifest(story)
    if manifest is None or not is_finished(manifest):
        raise InUse("a finished story can be given other pictures: draw it to its end first")
    mode, now = manifest["settings"]["mode"], given_now(shelf.said(story))
    _check_read(mode, wanted)
    if strange := sorted(set(wanted.references) - set(now["references"])):
        names = ", ".join(now["references"]) or "none"
        raise InputError(f"references: wanted the story's characters ({names}), got {shown(strange[0])}")
    known = {name for names in now["references"].values() for name in names} | {now["first_frame"]}
    for name in (*(name for names in wanted.references.values() for name in names), wanted.first_frame):
        if name is not None and name not in known and not _is_uploaded(shelf, story, name):
            raise InputError(f"wanted a picture that was uploaded or that the story names, got {shown(name)}")
    changed = {name: names for name, names in wanted.references.items() if names != now["references"][name]}
    first = wanted.first_frame if wanted.first_frame != now["first_frame"] else None
    if not changed and first is None:
        return None
    read, count = shelf.read(story), len(manifest["story"]["frames"])
    frames = [i for i in range(count) if first is not None or read.cast(i) & set(changed)]
    return {"references": changed, "first_frame": first, "frames": frames}


def _check_read(mode: str, wanted: Given) -> None:
    words = {"references": "pictures of characters", "first_frame": "a first frame"}
    for name, value in (("references", wanted.references), ("first_frame", wanted.first_frame)):
        if value and name not in what_is_read({"mode": mode}):
            reading = ", ".join(other for other in MODES if name in what_is_read({"mode": other}))
            raise InputError(
                f"{words[name]}: read by {reading} mode alone, and this story is drawn in {mode} mode"
            )


def _is_uploaded(shelf: Shelf, story: str, name: str) -> bool:
    return bool(PICTURE.fullmatch(name)) and (shelf.draft(story) / name).is_file()


def with_given(shelf: Shelf, name: str, story: Story, pictures: Mapping[str, Any]) -> Story:
    """The story with these pictures, as notes keep them; uploads are taken into its run folder."""

    def picture(said: str) -> Picture:
        if PICTURE.fullmatch(said):
            return MemoryPicture.of(open_picture(shelf.draft(name) / said))
        return _inside(shelf, name, said)

    cast = [
        replace(character, references=tuple(map(picture, pictures["references"][character.name])))
        for character in story.characters
        if character.name in pictures["references"]
    ]
    first = story.first_frame if pictures["first_frame"] is None else picture(pictures["first_frame"])
    return replace(_with_cast(story, cast), first_frame=first)


def _with_cast(story: Story, cast: list[Character]) -> Story:
    return story.with_characters(cast) if cast else story


def given_before(shelf: Shelf, name: str, pictures: Mapping[str, Any]) -> GivenPictures:
    """What a redraw replaced, as notes keep it, for its being taken back."""
    references = {
        character: tuple(_inside(shelf, name, said) for said in names)
        for character, names in pictures["references"].items()
    }
    first = pictures["first_frame"]
    return GivenPictures(references, _inside(shelf, name, first) if first else None)


def _inside(shelf: Shelf, name: str, said: str) -> Path:
    """A picture that the run's story file named. Raises InputError where it lies elsewhere."""
    file = (shelf.run(name) / said).resolve()
    if not file.is_relative_to(shelf.run(name)) or files.is_link_below(shelf.root, shelf.run(name) / said):
        raise InputError(f"wanted a picture in the run folder, got {shown(said)}")
    return file
