"""The folder that a server shows: which stories lie in it, what each of them holds, and the server's notes beside them.

FOLDER/
  <id>/                     a run folder, as `fastory generate` makes it
  .fastory/                 ours
    drafts/<id>/            story.json and pictures/ of a story that is being written; it has no run folder yet
    requests/<id>.json      what is to be drawn and is not done yet: the queue
    notes/<id>.json         the name it is shown under, locked frames, captions before a redraw
    trash/<id>-<n>/         deleted stories

A story is known by its id alone, the name of its folder; nothing outside FOLDER is read or written.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastory import files
from fastory.documents import read_json
from fastory.errors import InputError
from fastory.pictures import check_picture
from fastory.runs.identity import Identity
from fastory.runs.manifest import NAME, read_manifest, rounds_of, settings_of
from fastory.story import MAX_BYTES, Story
from fastory.story.files import read_document
from fastory.wording import shown

OWN = ".fastory"
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PICTURE = re.compile(r"pictures/[0-9a-f]{16}\.(png|jpg|webp|bmp|gif|tiff)")
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tiff"}
HINT = "choose another folder"


class NoSuchStory(InputError):
    """No story, frame or picture of this name lies in the folder."""


class InUse(InputError):
    """The story is being drawn, or is in a state in which this cannot be done."""


class Shelf:
    """The stories of a folder. Every method reads what is on disk now: the command line may change it, too."""

    def __init__(self, root: Path) -> None:
        """root: is made where it is missing. Raises InputError where it cannot be."""
        self.root = root.resolve()
        self.own = self.root / OWN
        if self.own.is_symlink():
            raise InputError(f"{self.own} is a symbolic link; move it away, or {HINT}")
        for name in ("drafts", "requests", "notes", "trash"):
            files.folder_for(self.own / name, HINT)
        self._manifests: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}
        self._sizes: dict[str, tuple[float, int]] = {}
        self._recast: dict[str, tuple[dict[str, Any], list[int]]] = {}

    # -- which there are -----------------------------------------------------------------------------------------

    def ids(self) -> list[str]:
        """Of all stories, the newest first."""
        found = {path.name: self._changed(path) for path in self.root.iterdir() if self._is_run(path)}
        for draft in (self.own / "drafts").iterdir():
            if ID.fullmatch(draft.name) and (draft / "story.json").is_file():
                found.setdefault(draft.name, self._changed(draft))
        return sorted(found, key=lambda story: (-found[story], story))

    def known(self, story: str) -> str:
        """The id itself. Raises NoSuchStory where it is none."""
        if ID.fullmatch(story) and (self.has_run(story) or self._draft_file(story).is_file()):
            return story
        raise NoSuchStory(f"there is no story {shown(story)} here")

    def has_run(self, story: str) -> bool:
        """Whether a run of it has begun: it has a manifest."""
        return self._is_run(self.root / story)

    def run(self, story: str) -> Path:
        """Its run folder, which may not be there yet."""
        return self.root / story

    def draft(self, story: str) -> Path:
        """The folder in which it is written."""
        return self.own / "drafts" / story

    def _is_run(self, path: Path) -> bool:
        file = path / NAME
        return bool(ID.fullmatch(path.name)) and file.is_file() and not files.is_link_below(self.root, file)

    def _draft_file(self, story: str) -> Path:
        return self.draft(story) / "story.json"

    @staticmethod
    def _changed(path: Path) -> float:
        newest = (path / name for name in (NAME, "story.json") if (path / name).exists())
        return max((file.stat().st_mtime for file in newest), default=0.0)

    # -- what it says --------------------------------------------------------------------------------------------

    def manifest(self, story: str) -> dict[str, Any] | None:
        """Of its run folder, or None before there is any; read again where the file is another. Not to be changed."""
        file = self.run(story) / NAME
        try:
            stat = file.stat()
        except FileNotFoundError:
            self._manifests.pop(story, None)
            return None
        key = (stat.st_mtime_ns, stat.st_size)
        known = self._manifests.get(story)
        if known is None or known[0] != key:
            known = self._manifests[story] = (key, read_manifest(file))
        return known[1]

    def said(self, story: str) -> dict[str, Any]:
        """What its story file says, as plain values; of a draft, what was written so far, whatever it is."""
        if self.has_run(story) and (self.run(story) / "story.yaml").is_file():
            data, _ = read_document(self._inside(self.run(story) / "story.yaml"))
        else:
            data = read_json(self._draft_file(story), what="a draft", most=MAX_BYTES)
        return data if isinstance(data, dict) else {}

    def read(self, story: str) -> Story:
        """The checked story: of the run folder, or the draft before there is any. Raises InputError as Story.read does."""
        file = self.run(story) / "story.yaml"
        return Story.read(
            self._inside(file if self.has_run(story) and file.is_file() else self._draft_file(story))
        )

    def recast(self, story: str) -> list[int]:
        """Frames of a finished story that were drawn with other pictures of their characters than it has now."""
        manifest = self.manifest(story)
        if manifest is None or not is_finished(manifest) or not manifest["story"].get("casts"):
            return []
        known = self._recast.get(story)
        if known is None or known[0] is not manifest:
            try:
                now = Identity.of(self.read(story), settings_of(manifest), {}, None)
                found = now.recast(manifest)
            except InputError:  # a story file that was changed by hand; a redraw says what is the matter
                found = []
            known = self._recast[story] = (manifest, found)
        return known[1]

    def _inside(self, file: Path) -> Path:
        """The file itself. Raises InputError where a link leads out of the folder, or may."""
        if files.is_link_below(self.root, file):
            raise InputError(f"{file} is reached through a symbolic link; move the link away")
        return file

    def disk_bytes(self, story: str) -> int:
        """Of all files of its folder; counted at most every 2 seconds."""
        at, size = self._sizes.get(story, (0.0, 0))
        if time.monotonic() - at > 2 or not at:
            folders = (self.run(story), self.draft(story))
            size = sum(path.lstat().st_size for folder in folders for path in _files_of(folder))
            self._sizes[story] = (time.monotonic(), size)
        return size

    # -- writing -------------------------------------------------------------------------------------------------

    def create(self, data: Mapping[str, Any]) -> str:
        """A new draft. Returns its id."""
        title = data.get("title")
        slug = Story(title=title if isinstance(title, str) else "story", frames=()).slug
        story = f"{slug}-{secrets.token_hex(4)}"
        self.write_draft(story, data)
        return story

    def write_draft(self, story: str, data: Mapping[str, Any]) -> None:
        """Keep what is written so far. Raises InUse once a run has begun, InputError for more than a story file may have."""
        if self.has_run(story):
            raise InUse("the story is drawn already: redraw frames of it, or duplicate it to change it")
        text = json.dumps(data, ensure_ascii=False, indent=1).encode()
        if len(text) > MAX_BYTES:
            raise InputError(f"the story: wanted at most {MAX_BYTES // 1024} KiB, got more: split it")
        files.atomic_write(self._draft_file(story), text)

    def add_picture(self, story: str, data: bytes, most_pixels: int) -> str:
        """Keep an uploaded picture, of a draft or for what is drawn next. Returns the name that the story has to say.

        Raises InputError for what is no picture, and for one of more than `most_pixels`.
        """
        manifest = self.manifest(story)
        if manifest is not None and not is_finished(manifest):
            raise InUse("the story is being drawn: give it pictures once it is finished")
        partial = self.draft(story) / f"upload-{secrets.token_hex(8)}"
        files.atomic_write(partial, data)
        try:
            suffix = _checked_suffix(partial, most_pixels)
            name = f"pictures/{files.sha256_of(partial)[:16]}.{suffix}"
            files.make_folder(self.draft(story) / "pictures")
            files.replace(partial, self.draft(story) / name)
        finally:
            files.remove(partial)
        return name

    def duplicate(self, story: str) -> str:
        """A draft that says the same, settings included, with its own copies of the pictures. Returns its id."""
        data = self._as_draft(story)
        title = data.get("title")
        data["title"] = f"{title if isinstance(title, str) else 'story'} (copy)"
        copy = f"{story[:80]}-{secrets.token_hex(4)}"
        self._copy_pictures(story, copy)
        self.write_draft(copy, data)
        return copy

    def back_to_draft(self, story: str) -> None:
        """A run is a draft again, what was drawn goes to the trash folder. Raises FastoryError where another process draws."""
        files.check_unlocked(self.run(story), "draws into", "stop it later")
        if not self._draft_file(story).is_file():  # a run of the command line
            self._copy_pictures(story, story)
            text = json.dumps(self._as_draft(story), ensure_ascii=False, indent=1)
            files.atomic_write(self._draft_file(story), text.encode())
        target = self._in_trash(story)
        files.make_folder(target)
        files.replace(self.run(story), target / "run")

    def _as_draft(self, story: str) -> dict[str, Any]:
        """What a draft has to say to be drawn as this story, settings that its run was given included."""
        data, manifest = dict(self.said(story)), self.manifest(story)
        if manifest is not None:
            own = {
                name: manifest["settings"][name]
                for name, source in manifest["sources"].items()
                if source not in ("paper", "model") and name in manifest["settings"]
            }
            stated = {name for name in ("style", "negative_prompt") if data.get(name) is not None}
            data["settings"] = {
                name: value for name, value in own.items() if name not in stated and value not in (None, "")
            }
        return data

    def _copy_pictures(self, story: str, draft: str) -> None:
        folder = self.run(story) if self.has_run(story) else self.draft(story)
        for name in ("inputs", "pictures"):
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                files.make_folder(self.draft(draft))
                shutil.copytree(folder / name, self.draft(draft) / name, symlinks=True, dirs_exist_ok=True)

    def to_trash(self, story: str) -> None:
        """Move all of it to the trash folder. Raises FastoryError where another process draws into it."""
        if self.has_run(story):
            files.check_unlocked(self.run(story), "draws into", "delete it later")
        target = self._in_trash(story)
        files.make_folder(target)
        moved = (("run", self.run(story)), ("draft", self.draft(story)))
        for name, source in moved:
            if source.is_dir():
                files.replace(source, target / name)
        for kind in ("requests", "notes"):
            file = self._record_file(kind, story)
            if file.exists():
                files.replace(file, target / f"{kind}.json")

    def _in_trash(self, story: str) -> Path:
        """A place for it there that is not taken."""
        number = 1
        while (self.own / "trash" / f"{story}-{number}").exists():
            number += 1
        return self.own / "trash" / f"{story}-{number}"

    # -- requests and notes --------------------------------------------------------------------------------------

    def request(self, story: str) -> dict[str, Any] | None:
        """What is to be drawn of it: kind, order, paused, error and, for a redraw, frames and seed."""
        try:
            return self._record("requests", story)
        except InputError as error:  # it stands still, and says why
            return {"kind": "draw", "paused": True, "error": str(error)}

    def requests(self) -> list[tuple[str, dict[str, Any]]]:
        """All of them, in their order."""
        names = [path.stem for path in (self.own / "requests").glob("*.json") if ID.fullmatch(path.stem)]
        found = [(name, record) for name in names if (record := self.request(name)) is not None]
        return sorted(found, key=lambda pair: pair[1].get("order", 0))

    def write_request(self, story: str, request: Mapping[str, Any] | None) -> None:
        """Keep what is to be drawn; None forgets it."""
        self._write_record("requests", story, request)

    def notes(self, story: str) -> dict[str, Any]:
        """name, locked (frames), pictures (for what is drawn next), before and given (what frames said, and what pictures
        the story had, before each redraw)."""
        return self._record("notes", story) or {}

    def write_notes(self, story: str, notes: Mapping[str, Any]) -> None:
        """Keep them."""
        self._write_record("notes", story, notes)

    def _record_file(self, kind: str, story: str) -> Path:
        return self.own / kind / f"{story}.json"

    def _record(self, kind: str, story: str) -> dict[str, Any] | None:
        file = self._record_file(kind, story)
        if not file.is_file():
            return None
        data = read_json(file, what="a note of the server's", todo="remove it")
        return data if isinstance(data, dict) else None

    def _write_record(self, kind: str, story: str, record: Mapping[str, Any] | None) -> None:
        file = self._record_file(kind, story)
        if record is None:
            files.remove(file)
        else:
            files.atomic_write(file, json.dumps(record, ensure_ascii=False, indent=1).encode())


def is_finished(manifest: Mapping[str, Any]) -> bool:
    """Whether everything of a run was written and no redraw is under way."""
    return bool(manifest["products"]) and not manifest.get("redraw")


def drawn(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """A mapping a round: the frames that are drawn, as text, each with the first 12 hex digits of its file's sha256."""
    return [
        {frame: record["sha256"][:12] for frame, record in manifest["pictures"].get(str(round), {}).items()}
        for round in range(rounds_of(manifest["settings"]))
    ]


def _files_of(folder: Path) -> list[Path]:
    found = []
    for path, _, names in os.walk(folder):
        found += [Path(path) / name for name in names]
    return [path for path in found if path.exists()]


def _checked_suffix(file: Path, most_pixels: int) -> str:
    from PIL import Image

    try:
        with Image.open(file) as image:
            kind, pixels = image.format or "", image.width * image.height
    except Exception:
        kind, pixels = "", 0  # check_picture says what is the matter
    if pixels > most_pixels:
        raise InputError(f"the picture: wanted at most {most_pixels} pixels, got {pixels}: make it smaller")
    check_picture(file, "the picture")
    return SUFFIXES[kind]
