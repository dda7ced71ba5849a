"""A story: captions, characters and how they should look, checked as it is made."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from fastory import files
from fastory.errors import InputError
from fastory.pictures import MemoryPicture, Picture, as_picture, as_pictures, check_picture
from fastory.story.files import READERS, read_document, yaml_text
from fastory.story.frame import Character, Frame
from fastory.story.names import Names
from fastory.story.pronouns import Listener, Meant, Someone
from fastory.story.schema import (
    MAX_FRAMES,
    MAX_NAME,
    SCHEMA,
    FrameEntry,
    Location,
    Origin,
    StoryEntry,
    check_entry,
    describe,
    nearest,
    style_template,
    visible,
)
from fastory.wording import shown

_CLOSED = re.compile(r"\s*([,.;:!?)\]…]|$)")  # a caption's own punctuation follows


@dataclass(frozen=True)
class Story:
    """A checked story, made by `read` or `from_captions`; the constructor itself checks nothing.

    style: a name in STYLES, a text with {prompt}, or None for captions as they are.
    settings: the file's `settings:` as given; whoever uses them checks them and can say `where` they stand.
    first_frame: the picture that causal mode takes as frame 0, as a path or PIL's; iterative mode says that it does not.
    initial_pictures: the first references in place of drawn ones, as paths or PIL's: of iterative mode those of round 0, one
    for each frame or one for all; of reference mode the bank.
    source, lines: the file, and the line (from 1) of every key and list item in it.
    """

    title: str
    frames: tuple[Frame, ...]
    characters: tuple[Character, ...] = ()
    style: str | None = None
    negative_prompt: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict, hash=False)
    first_frame: Picture | None = None
    initial_pictures: tuple[Picture, ...] = ()
    source: Path | None = field(default=None, compare=False)
    lines: Mapping[Location, int] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Pictures in memory are kept as files would be."""
        object.__setattr__(self, "initial_pictures", as_pictures(self.initial_pictures))
        if self.first_frame is not None:
            object.__setattr__(self, "first_frame", as_picture(self.first_frame))

    @classmethod
    def read(cls, path: str | Path) -> Story:
        """Read a story file; its suffix tells its form: .txt, .yaml, .yml or .json.

        Raises InputError, naming file and line, for whatever cannot be used. Reference pictures are decoded
        once here, so that a damaged one is found before anything is drawn.
        """
        path = Path(path)
        data, lines = read_document(path)
        return build_story(Origin(str(path), lines), data, path)

    @classmethod
    def from_captions(
        cls, captions: Sequence[str], title: str = "story", characters: Sequence[Character] = ()
    ) -> Story:
        """A story of captions, a frame for each, and of characters that they name. Raises InputError as `read` does."""
        if isinstance(captions, str | bytes) or not isinstance(captions, Iterable):
            raise InputError(
                f"captions: wanted a list of texts, got {describe(captions)}: pass [caption, ...]."
            )
        frames = list(islice(captions, MAX_FRAMES + 1))  # what gives captions may never end
        return build_story(Origin("captions", {}), {"title": title, "frames": frames}, None).with_characters(
            characters
        )

    def with_characters(self, characters: Sequence[Character]) -> Story:
        """The story with these characters too; one of the same name, in any case, takes the place of the story's own.

        Raises InputError for a name, a prompt or a scale that no story file may have, and for what is no picture.
        """
        cast = {character.name.casefold(): character for character in self.characters}
        for character in characters:
            said = {"prompt": character.prompt, "scale": character.scale}
            origin = Origin("characters", {})
            entry = check_entry(origin, {"frames": ["-"], "characters": {character.name: said}})
            (checked,) = _characters(origin, entry, _Pictures(origin, None))
            for picture in character.references:
                if isinstance(picture, Path):
                    check_picture(picture)
            cast[checked.name.casefold()] = replace(checked, references=character.references)
        return replace(self, characters=tuple(cast.values()))

    def understood(self) -> tuple[Story, list[Meant]]:
        """The story with its pronouns understood (pronouns.py), and what each was taken to mean.

        Who is meant stands in the frames' `characters`, as if the file had named it.
        """
        listener = Listener([Someone(character.name, character.prompt) for character in self.characters])
        frames, meant = [], list[Meant]()
        for i, frame in enumerate(self.frames):
            frame = replace(frame, spoken=None)
            named = [self.characters[index].name for index, _ in self._names.find(frame.caption)]
            spoken = listener.hear(i, frame.caption, named, frame.characters)
            if spoken.meant:
                names = (name for pronoun in spoken.meant for name in pronoun.names)
                cast = tuple(dict.fromkeys((*frame.characters, *names)))
                frame = replace(frame, characters=cast, spoken=spoken.caption)
            frames.append(frame)
            meant += spoken.meant
        return (replace(self, frames=tuple(frames)) if meant else self), meant

    @property
    def slug(self) -> str:
        """The title as a file name for any file system: 1..60 of a-z, 0-9 and '-'."""
        folded = unicodedata.normalize("NFKD", self.title).encode("ascii", "ignore").decode().lower()
        slug = re.sub(r"[^a-z0-9]+", "-", folded).strip("-")[:60].strip("-")
        if not slug:  # a title in another script; the hash keeps two such stories apart
            return f"story-{_sha256(self.title)[:8]}"
        # Windows keeps these names for devices
        return f"story-{slug}" if re.fullmatch(r"con|prn|aux|nul|(com|lpt)\d", slug) else slug

    def where(self, key: str | Sequence[str | int]) -> str:
        """'file:line' of "settings.steps" or ("frames", 2, "seed"); "" where the file has no such key."""
        parts = key.split(".") if isinstance(key, str) else key
        location = tuple(int(part) if isinstance(part, str) and part.isdecimal() else part for part in parts)
        line = self.lines.get(location)
        return f"{self.source}:{line}" if line else ""

    def prompt(self, i: int, style: str | None = None) -> str:
        """Frame i's caption as the text encoder gets it: characters described, then the style applied.

        The first occurrence of a character's name reads `<name>, <prompt>,`.
        style: a name in STYLES or a text with {prompt}; None stands for the story's own.
        Raises InputError for an unknown style.
        """
        described = "".join(self._described(i))
        template = style_template(self.style if style is None else style)
        if not template.endswith("{prompt}"):
            described = described.removesuffix(".")  # the sentence goes on
        return template.replace("{prompt}", described)

    def _described(self, i: int) -> Iterator[str]:
        """The parts of a caption, a character's prompt after the first occurrence of its name."""
        caption, end = self.frames[i].text, 0
        introduced: set[str] = set()
        for index, match in self._mentions(i):
            yield caption[end : match.end()]
            end, character = match.end(), self.characters[index]
            if character.prompt is not None and character.name not in introduced:
                introduced.add(character.name)
                yield f", {character.prompt}" + ("" if _CLOSED.match(caption, end) else ",")
        yield caption[end:]

    def cast(self, i: int) -> frozenset[str]:
        """Names of the characters in frame i: whole words of its caption, in any case, or in its own list."""
        if i not in self._casts:
            named = {self.characters[index].name for index, _ in self._mentions(i)}
            self._casts[i] = frozenset(named.union(self.frames[i].characters))
        return self._casts[i]

    def spans(self, prompt: str) -> Iterator[tuple[str, int, int]]:
        """Where a frame's prompt speaks of a character: its name, first letter, one past the last.

        What follows the name as its description is part of it.
        """
        for index, match in self._names.find(prompt):
            character, end = self.characters[index], match.end()
            described = f", {character.prompt}"
            if character.prompt is not None and prompt.startswith(described, end):
                end += len(described)
            yield character.name, match.start(), end

    def _mentions(self, i: int) -> Iterator[tuple[int, re.Match[str]]]:
        """Which character is named in frame i's text, and where."""
        return self._names.find(self.frames[i].text)

    # What does not change with a frozen story is made once; it is no field, so that it does not count in comparisons.

    @cached_property
    def _names(self) -> Names:
        return Names([character.name for character in self.characters])

    @cached_property
    def _casts(self) -> dict[int, frozenset[str]]:
        return {}

    def digest(self) -> str:
        """Hex sha256 of what the story means: its texts, seeds, characters and the bytes of their pictures.

        Paths, layout, comments and `settings` do not count (resolved settings have a hash of their own).
        """
        return _sha256(
            [self.digest_without_frames(), *(self.frame_digest(i) for i in range(len(self.frames)))]
        )

    def frame_digest(self, i: int) -> str:
        """Hex sha256 of what frame i alone says: caption, seed, cast, boxes and masks."""
        frame = self.frames[i]
        masks = [[name, _picture_digest(mask)] for name, mask in frame.masks]
        return _sha256(
            [frame.caption, frame.seed, sorted(self.cast(i)), frame.boxes, *([masks] if masks else [])]
        )

    def digest_without_frames(self) -> str:
        """Hex sha256 of everything but what single frames say; the number of frames counts."""
        pictures = self.picture_digests()
        cast = [[c.name, c.prompt, [pictures[p] for p in c.references], c.scale] for c in self.characters]
        first_frame = pictures[self.first_frame] if self.first_frame else None
        initial = [pictures[picture] for picture in self.initial_pictures]
        said = [self.title, self.style, self.negative_prompt, cast, first_frame, len(self.frames)]
        return _sha256([*said, *([initial] if initial else [])])

    def pictures(self) -> set[Picture]:
        """Every picture that the story names, or was given."""
        first = {self.first_frame} if self.first_frame else set[Picture]()
        masks = (mask for frame in self.frames for _, mask in frame.masks)
        return first.union(
            masks, self.initial_pictures, *(character.references for character in self.characters)
        )

    def inputs(self) -> list[MemoryPicture]:
        """Those of its pictures that are in memory, sorted by name."""
        inputs = (picture for picture in self.pictures() if isinstance(picture, MemoryPicture))
        return sorted(inputs, key=lambda picture: picture.name)

    def picture_digests(self) -> dict[Picture, str]:
        """Hex sha256 of every picture the story names, each read once, as it is now. Raises InputError for a lost one."""
        return {picture: _picture_digest(picture) for picture in self.pictures()}

    def to_yaml(self, base: Path | None = None) -> str:
        """The story as a YAML file that reads back to the same digest.

        base: the folder that picture paths are written relative to; None is the story file's own. Pictures in memory are
        named as a run folder keeps them.
        """
        folder = base or (self.source.parent if self.source else Path())
        data = {
            "version": SCHEMA,
            "title": self.title,
            "style": self.style,
            "negative_prompt": self.negative_prompt,
            "settings": dict(self.settings),
            "first_frame": self.first_frame and _relative(self.first_frame, folder),
            "initial_pictures": [_relative(picture, folder) for picture in self.initial_pictures],
            "characters": {c.name: _character_data(c, folder) for c in self.characters},
            "frames": [_frame_data(frame, folder) for frame in self.frames],
        }
        return yaml_text(_without_defaults(data))


def are_captions(texts: Sequence[object]) -> bool:
    """Whether all of them are texts, and none is a file, or has the suffix of a story file."""
    return all(
        isinstance(text, str) and not text.lower().endswith(tuple(READERS)) and not os.path.exists(text)
        for text in texts
    )


# From what is said to a Story.


def build_story(origin: Origin, data: Any, source: Path | None) -> Story:
    """The story that a document's values say. source: its file, whose folder the paths of pictures start at."""
    entry = check_entry(origin, data)
    pictures = _Pictures(origin, source.parent if source else None)
    characters = _characters(origin, entry, pictures)
    names = {character.name.casefold(): character.name for character in characters}
    first_frame = entry.first_frame and pictures.path(("first_frame",), entry.first_frame)
    return Story(
        title=entry.title or _title_of(source),
        frames=tuple(_frame(origin, i, frame, names, pictures) for i, frame in enumerate(entry.frames)),
        characters=characters,
        style=entry.style,
        negative_prompt=entry.negative_prompt,
        settings=entry.settings,
        first_frame=first_frame or None,
        initial_pictures=tuple(
            pictures.path(("initial_pictures", i), name) for i, name in enumerate(entry.initial_pictures)
        ),
        source=source,
        lines=origin.lines,
    )


def _title_of(source: Path | None) -> str:
    try:
        # a file name may hold bytes that are no text
        return visible(source.stem) if source else "story"
    except ValueError:
        return "story"


def _characters(origin: Origin, entry: StoryEntry, pictures: _Pictures) -> tuple[Character, ...]:
    characters: dict[str, Character] = {}
    for name, said in entry.characters.items():
        location: Location = ("characters", name)
        if name.casefold() in characters:
            other = characters[name.casefold()].name
            text = f"wanted names that differ in more than case, got {other!r} and {name!r}: rename one"
            raise origin.error(location, text)
        if len(name) > MAX_NAME:
            text = f"wanted a name of at most {MAX_NAME} letters, got {len(name)}: shorten it"
            raise origin.error(("characters",), text)
        references = tuple(
            pictures.path((*location, "references", i), reference)
            for i, reference in enumerate(said.references)
        )
        characters[name.casefold()] = Character(name, said.prompt, references, said.scale)
    return tuple(characters.values())


def _frame(origin: Origin, i: int, entry: FrameEntry, names: Mapping[str, str], pictures: _Pictures) -> Frame:
    def known(name: str, *location: str | int) -> str:
        if name.casefold() not in names:
            todo = nearest(name, names.values()) or ": add it to `characters:`"
            wanted = f"wanted one of the story's characters ({', '.join(names.values()) or 'none'})"
            raise origin.error(("frames", i, *location), f"{wanted}, got {describe(name)}{todo}")
        return names[name.casefold()]

    characters = dict.fromkeys(known(name, "characters", k) for k, name in enumerate(entry.characters))
    boxes = {known(name, "boxes", name): (b[0], b[1], b[2], b[3]) for name, b in entry.boxes.items()}
    masks = {
        known(name, "masks", name): pictures.path(("frames", i, "masks", name), mask)
        for name, mask in entry.masks.items()
    }
    if twice := [name for name in masks if name in boxes]:
        text = f"wanted a box or a mask of {twice[0]}, got both: remove one"
        raise origin.error(("frames", i, "masks", twice[0]), text)
    return Frame(entry.caption, entry.seed, tuple(characters), tuple(boxes.items()), tuple(masks.items()))


class _Pictures:
    """The pictures that a story names, each looked for and decoded once however often it is named."""

    def __init__(self, origin: Origin, folder: Path | None) -> None:
        self._origin, self._folder = origin, folder
        self._paths: dict[str, Path] = {}
        self._decoded: set[Path] = set()

    def path(self, location: Location, name: str) -> Path:
        """The absolute path of a picture that lies in the story's folder and can be decoded."""
        if name not in self._paths:
            path = self._inside(location, name)
            if path not in self._decoded:
                try:
                    check_picture(path, shown(name, 200))
                except InputError as error:
                    raise self._origin.error(location, str(error)) from error
                self._decoded.add(path)
            self._paths[name] = path
        return self._paths[name]

    def _inside(self, location: Location, picture: str) -> Path:
        error, name = self._origin.error, shown(picture, 200)
        if self._folder is None:
            raise error(location, "wanted captions alone, got a picture: read the story from a file")
        try:
            root = self._folder.resolve()
            path = (root / picture).resolve()
            inside, is_file, is_folder = path.is_relative_to(root), path.is_file(), path.is_dir()
        except (OSError, ValueError, RuntimeError) as problem:
            said = problem.strerror if isinstance(problem, OSError) else problem
            raise error(location, f"wanted the path of a picture, got {name} ({said})") from problem
        if not inside:
            raise error(
                location, f"wanted a picture in the story's folder, got {name} outside it: copy it there"
            )
        if not is_file:
            got = "a folder" if is_folder else "no such file"
            raise error(location, f"wanted a picture, got {name}, {got}: paths start at the story's folder")
        return path


# From a Story to texts and hashes.


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _picture_digest(path: Picture) -> str:
    if isinstance(path, MemoryPicture):
        return path.sha256
    try:
        return files.sha256_of(path)
    except OSError as error:
        raise InputError(
            f"{path}: wanted the picture that was there when the story was read: {error}."
        ) from error


def _relative(path: Picture, folder: Path) -> str:
    if isinstance(path, MemoryPicture):
        return path.name
    return Path(os.path.relpath(path, folder.resolve())).as_posix()


def _without_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None and value not in ([], {})}


def _character_data(character: Character, folder: Path) -> dict[str, Any]:
    references = [_relative(path, folder) for path in character.references]
    data = {"prompt": character.prompt, "references": references, "scale": character.scale}
    return _without_defaults(data)


def _frame_data(frame: Frame, folder: Path) -> str | dict[str, Any]:
    boxes = {name: list(box) for name, box in frame.boxes}
    data = {
        "caption": frame.caption,
        "seed": frame.seed,
        "characters": list(frame.characters),
        "boxes": boxes,
        "masks": {name: _relative(mask, folder) for name, mask in frame.masks},
    }
    data = _without_defaults(data)
    return frame.caption if data.keys() == {"caption"} else data
