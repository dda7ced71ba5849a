"""A story: captions, characters and how they should look. Read from .txt, .yaml or .json and checked."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fastory import files
from fastory.errors import InputError
from fastory.names import Names
from fastory.pictures import check_picture
from fastory.wording import shown

SCHEMA = 1
MAX_BYTES = 2**20  # a thousand captions of a thousand characters; PyYAML takes seconds for each megabyte
MAX_DEPTH = 32  # of nested brackets; what lies deeper can only be meant to exhaust the stack
MAX_FRAMES = 10_000
MAX_NAME = 200  # letters of a character's name; the search for names in captions counts on an end
MAX_SEED = 2**63 - 1
SUFFIXES = (".txt", ".yaml", ".yml", ".json")

STYLES = {
    "comic": "comic book panel, {prompt}, bold ink outlines, flat colours",
    "film": "film still, {prompt}, cinematic lighting, shallow depth of field",
    "realistic": "photograph, {prompt}, natural light, fine detail",
    "none": "{prompt}",
}

_TOO_MANY = f"wanted at most {MAX_FRAMES} frames, got more: split the story"
_CLOSED = re.compile(r"\s*([,.;:!?)\]…]|$)")  # a caption's own punctuation follows

Location = tuple[str | int, ...]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Character:
    """Who appears in a story.

    name: as it occurs in captions, as a whole word in any case.
    prompt: what follows the name's first occurrence in a caption, or None.
    references: absolute paths of pictures that show the character.
    scale: weight of these pictures; None is the round's reference scale.
    """

    name: str
    prompt: str | None = None
    references: tuple[Path, ...] = ()
    scale: float | None = None


@dataclass(frozen=True)
class Frame:
    """One picture of a story.

    seed: overrides the run's noise for this frame, 0..2**63-1.
    characters: names of characters that the caption does not mention.
    boxes: reserved: (name, (left, top, right, bottom)) in fractions of the picture. Checked, not used yet.
    """

    caption: str
    seed: int | None = None
    characters: tuple[str, ...] = ()
    boxes: tuple[tuple[str, Box], ...] = ()


@dataclass(frozen=True)
class Story:
    """A checked story, made by `read` or `from_captions`; the constructor itself checks nothing.

    style: a name in STYLES, a text with {prompt}, or None for captions as they are.
    settings: the file's `settings:` as given; whoever uses them checks them and can say `where` they stand.
    first_frame: absolute path of the picture that causal mode takes as frame 0; iterative mode says that it does not.
    source, lines: the file, and the line (from 1) of every key and list item in it.
    """

    title: str
    frames: tuple[Frame, ...]
    characters: tuple[Character, ...] = ()
    style: str | None = None
    negative_prompt: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict, hash=False)
    first_frame: Path | None = None
    source: Path | None = field(default=None, compare=False)
    lines: Mapping[Location, int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Story:
        """Read a story file; its suffix tells its form: .txt, .yaml, .yml or .json.

        Raises InputError, naming file and line, for whatever cannot be used. Reference pictures are decoded
        once here, so that a damaged one is found before anything is drawn.
        """
        path = Path(path)
        files.check_names_fit([path])
        readers = dict(zip(SUFFIXES, (_read_txt, _read_yaml, _read_yaml, _read_json), strict=True))
        reader = readers.get(path.suffix.lower())
        if path.is_dir():
            raise InputError(f"{path}: wanted a story file, got a folder: name the file in it.")
        if reader is None:
            got = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
            raise InputError(
                f"{path}: wanted a story file ({', '.join(readers)}), got {got}: rename the file."
            )
        data, lines = reader(_read_text(path), str(path))
        return _build(_Origin(str(path), lines), data, path)

    @classmethod
    def from_captions(cls, captions: Sequence[str], title: str = "story") -> Story:
        """A story of captions alone, a frame for each. Raises InputError as `read` does."""
        if isinstance(captions, str | bytes) or not isinstance(captions, Iterable):
            raise InputError(
                f"captions: wanted a list of texts, got {_describe(captions)}: pass [caption, ...]."
            )
        frames = list(islice(captions, MAX_FRAMES + 1))  # what gives captions may never end
        return _build(_Origin("captions", {}), {"title": title, "frames": frames}, None)

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
        caption, end = self.frames[i].caption, 0
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

    def _mentions(self, i: int) -> Iterator[tuple[int, re.Match[str]]]:
        """Which character is named in frame i's caption, and where."""
        return self._names.find(self.frames[i].caption)

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
        """Hex sha256 of what frame i alone says: caption, seed, cast and boxes."""
        frame = self.frames[i]
        return _sha256([frame.caption, frame.seed, sorted(self.cast(i)), frame.boxes])

    def digest_without_frames(self) -> str:
        """Hex sha256 of everything but what single frames say; the number of frames counts."""
        pictures = self.picture_digests()
        cast = [[c.name, c.prompt, [pictures[p] for p in c.references], c.scale] for c in self.characters]
        first_frame = pictures[self.first_frame] if self.first_frame else None
        return _sha256([self.title, self.style, self.negative_prompt, cast, first_frame, len(self.frames)])

    def picture_digests(self) -> dict[Path, str]:
        """Hex sha256 of every picture the story names, each read once, as it is now. Raises InputError for a lost one."""
        first = {self.first_frame} if self.first_frame else set[Path]()
        paths = first.union(*(character.references for character in self.characters))
        return {path: _picture_digest(path) for path in paths}

    def to_yaml(self, base: Path | None = None) -> str:
        """The story as a YAML file that reads back to the same digest.

        base: the folder that picture paths are written relative to; None is the story file's own.
        """
        folder = base or (self.source.parent if self.source else Path())
        data = {
            "version": SCHEMA,
            "title": self.title,
            "style": self.style,
            "negative_prompt": self.negative_prompt,
            "settings": dict(self.settings),
            "first_frame": self.first_frame and _relative(self.first_frame, folder),
            "characters": {c.name: _character_data(c, folder) for c in self.characters},
            "frames": [_frame_data(frame) for frame in self.frames],
        }
        return yaml.dump(
            _without_defaults(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20
        )


def style_template(style: str | None) -> str:
    """The text with {prompt} that a style stands for. Raises InputError for an unknown name."""
    if style is None:
        return "{prompt}"
    if "{prompt}" in style:
        return style
    if style.lower() in STYLES:
        return STYLES[style.lower()]
    hint = _nearest(style.lower(), STYLES)
    raise InputError(
        f"style: wanted {', '.join(STYLES)} or a text with {{prompt}}, got {_describe(style)}{hint}."
    )


def are_captions(texts: Sequence[object]) -> bool:
    """Whether all of them are texts, and none is a file, or has the suffix of a story file."""
    return all(
        isinstance(text, str) and not text.lower().endswith(SUFFIXES) and not os.path.exists(text)
        for text in texts
    )


# What a file says: its text, then plain values and the line of each.


def _read_text(path: Path) -> str:
    wanted = f"{path}: wanted a story file,"
    try:
        if not path.exists():
            raise InputError(f"{wanted} but there is none: check the path.")
        if not path.is_file():  # a pipe would be waited for, a device read without end
            raise InputError(f"{wanted} got a pipe or a device: save it as a file.")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{wanted} but it cannot be read ({error}): check the path and its permissions."
        ) from error
    if len(raw) > MAX_BYTES:
        raise InputError(f"{wanted} of at most {MAX_BYTES // 1024} KiB, got more: split the story.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        got = f"got the byte 0x{raw[error.start]:02x}"
        raise InputError(f"{path}:{line}: wanted text in UTF-8, {got}: save the file as UTF-8.") from error
    if not text.strip():
        raise InputError(f"{path}:1: wanted captions, got an empty file: write at least one caption.")
    return text


def _read_txt(text: str, name: str) -> tuple[Any, dict[Location, int]]:
    captions: list[str] = []
    lines: dict[Location, int] = {(): 1}
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            lines["frames", len(captions)] = number
            captions.append(line)
    return {"frames": captions}, lines


def _read_yaml(text: str, name: str) -> tuple[Any, dict[Location, int]]:
    lines: dict[Location, int] = {(): 1}
    try:
        _check_events(text, name)
        loader = _Loader(text)
        node = loader.get_single_node()
        _record_lines(node, (), lines, name)
        return _plain(node, loader, name), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        said = ", ".join(filter(None, [error.context, error.problem]))
        todo = 'indent with spaces, and put texts that hold ": " or " #" in quotes'
        raise InputError(f"{place}: wanted YAML, but {said}: {todo}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        got = f"U+{ord(text[error.position]):04X}"
        raise InputError(
            f"{name}:{line}: wanted YAML, got the control character {got}: remove it."
        ) from error


def _read_json(text: str, name: str) -> tuple[Any, dict[Location, int]]:
    twice: list[str] = []
    try:
        data = json.loads(text, object_pairs_hook=lambda pairs: _noting_twice(pairs, twice))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name}:{error.lineno}: wanted JSON, but {error.msg.lower()}: correct that line."
        ) from error
    except RecursionError as error:
        raise InputError(
            f"{name}: wanted at most {MAX_DEPTH} nested brackets, got more: flatten the file."
        ) from error
    except ValueError as error:
        raise InputError(
            f"{name}: wanted JSON with ordinary numbers, but {error}: shorten the number."
        ) from error
    _check_length(_Origin(name, {}), data)
    lines = _lines_of_json(text, name)
    if twice:  # where YAML can follow the layout it has said so, with the line
        raise InputError(f"{name}: the key {twice[0][:60]!r} stands there twice: remove one.")
    return data, lines


def _noting_twice(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice += [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    return found


def _lines_of_json(text: str, name: str) -> dict[Location, int]:
    """The lines of a JSON file's keys and items, found by YAML; the values are JSON's own.

    JSON is YAML but for tabs between values (within texts they are escaped), a few characters, and the escapes of those
    beyond U+FFFF.
    """
    text = yaml.reader.Reader.NON_PRINTABLE.sub("?", text.replace("\t", " "))
    text = re.sub("[\x85\u2028\u2029]", "?", text)  # line ends for YAML alone
    lines: dict[Location, int] = {(): 1}
    try:
        _check_events(text, name)
        _record_lines(_Loader(text).get_single_node(), (), lines, name)
    except yaml.YAMLError:
        lines.clear()  # a layout that YAML cannot follow, such as a colon on a line of its own
    return lines


class _Loader(yaml.SafeLoader):
    """YAML's safe types by the rules of YAML 1.2: `No`, `12:30`, `2024-01-01` are texts, 1e5 is a number."""


class _Dumper(yaml.SafeDumper):
    """Puts in quotes whatever the rules of YAML 1.1 or 1.2 would take for another type than text."""


_Loader.yaml_implicit_resolvers = {}
_CORE_SCHEMA = (  # YAML 1.2.2, section 10.3.2
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),  # 010 would be read as octal
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+|[0-9]+\.[0-9]*|\.[0-9]+[eE][-+]?[0-9]+)"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
for _tag, _pattern, _first in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _check_events(text: str, name: str) -> None:
    """Aliases let a short file grow to any size, and depth exhausts the stack; events suffer from neither.

    Frames are counted here already: PyYAML takes seconds for each megabyte.
    """
    depth, frames, key = 0, 0, ""
    for event in yaml.parse(text, Loader=_Loader):
        place = f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if isinstance(event, yaml.AliasEvent):
            raise InputError(
                f"{place}: wanted plain YAML, got the alias *{event.anchor}: write the value out."
            )
        if depth == 1 and isinstance(event, yaml.ScalarEvent):
            key = event.value  # or the value of another key, which the next key replaces
        if depth == 2 and key == "frames" and isinstance(event, yaml.NodeEvent):
            frames += 1
            if frames > MAX_FRAMES:
                raise InputError(f"{place}: frames: {_TOO_MANY}.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise InputError(
                f"{place}: wanted at most {MAX_DEPTH} nested brackets, got more: flatten the file."
            )


def _record_lines(node: yaml.Node | None, location: Location, lines: dict[Location, int], name: str) -> None:
    """Note the line of every key and list item under node. Refuses a key that is given twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(
                    f"{name}:{line}: wanted a text as key, got a list or mapping: write key: value."
                )
            below = (*location, key.value)
            if below in lines:
                raise InputError(
                    f"{name}:{line}: the key {key.value!r} stands in line {lines[below]} already: remove one."
                )
            lines[below] = line
            _record_lines(value, below, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[*location, index] = item.start_mark.line + 1
            _record_lines(item, (*location, index), lines, name)


def _plain(node: yaml.Node | None, loader: _Loader, name: str) -> Any:
    """A node as dict, list, str, int, float, bool or None. Keys are texts as written."""
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return {key.value: _plain(value, loader, name) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_plain(item, loader, name) for item in node.value]
    if node is None:
        return None
    place = f"{name}:{node.start_mark.line + 1}"
    kinds = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}
    if node.tag not in kinds or not isinstance(node, yaml.ScalarNode):
        raise InputError(f"{place}: wanted plain values, got the YAML tag {node.tag!r}: remove the tag.")
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError) as error:  # `!!int x`, and a number of thousands of digits
        raise InputError(
            f"{place}: wanted a value, got {_describe(node.value)} ({error}): correct it."
        ) from error


# What a story may say: the schema, and errors in its terms.


def _clean(text: str) -> str:
    """One line in NFC, as the tokenizers read it. Refuses what no file or page can hold."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise ValueError(f"wanted text, got the control character U+{ord(character):04X}: remove it")
    return text


def _visible(text: str) -> str:
    cleaned = _clean(text)
    if all(unicodedata.category(character) in ("Cf", "Zs") for character in cleaned):
        raise ValueError("wanted a text, got an empty one: write something or remove the entry")
    return cleaned


def _style(text: str) -> str:
    text = _clean(text)
    try:
        style_template(text)
    except InputError as error:
        raise ValueError(str(error).removeprefix("style: ").removesuffix(".")) from error
    return text if "{prompt}" in text else text.lower()


def _ordered(box: list[float]) -> list[float]:
    left, top, right, bottom = box
    if not (left < right and top < bottom):
        raise ValueError(f"wanted [left, top, right, bottom] with left < right and top < bottom, got {box}")
    return box


def _encodable(settings: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(settings, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("wanted text, got half of a UTF-16 pair: remove the \\u escape") from error
    return settings


Text = Annotated[str, AfterValidator(_visible)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _empty_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class _CharacterEntry(_Strict):
    prompt: Text | None = None
    references: list[str] = []
    scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class _FrameEntry(_Strict):
    caption: Text
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    characters: list[Text] = []
    boxes: dict[
        Text, Annotated[list[Fraction], Field(min_length=4, max_length=4), AfterValidator(_ordered)]
    ] = {}


class _StoryEntry(_Strict):
    version: int = SCHEMA
    title: Text | None = None
    style: Annotated[str, AfterValidator(_style)] | None = None
    negative_prompt: Annotated[str, AfterValidator(_clean)] | None = None
    settings: Annotated[dict[str, Any], AfterValidator(_encodable)] = {}
    first_frame: str | None = None
    characters: dict[Text, Annotated[_CharacterEntry, BeforeValidator(lambda value: value or {})]] = {}
    frames: Annotated[
        list[
            Annotated[
                _FrameEntry,
                BeforeValidator(lambda value: {"caption": value} if isinstance(value, str) else value),
            ]
        ],
        Field(min_length=1),
    ]


_ENTRIES: dict[Location, type[_Strict]] = {
    (): _StoryEntry,
    ("characters", "*"): _CharacterEntry,
    ("frames", "*"): _FrameEntry,
}
_WANTED: dict[Location, str] = {
    (): "a mapping with `frames:` and perhaps title, style, characters, settings",
    ("version",): f"the number {SCHEMA}",
    ("title",): "a text (in quotes if it looks like a number)",
    ("style",): f"{', '.join(STYLES)} or a text with {{prompt}}",
    ("negative_prompt",): "a text",
    ("settings",): "a mapping of settings, such as {steps: 50}",
    ("first_frame",): "the path of a picture in the story's folder",
    ("characters",): "a mapping of names, such as {Ann: {prompt: a girl in a red coat}}",
    ("characters", "*"): "a mapping such as {prompt: a girl in a red coat, references: [ann.png]}",
    ("characters", "*", "prompt"): "a text",
    ("characters", "*", "references"): "a list of pictures, such as [ann.png]",
    ("characters", "*", "references", "*"): "the path of a picture in the story's folder",
    ("characters", "*", "scale"): "a finite number from 0 on, such as 0.5",
    ("frames",): "a list of at least one caption",
    (
        "frames",
        "*",
    ): 'a caption (in quotes if it looks like a number or holds ": ") or {caption: ..., seed: 7}',
    ("frames", "*", "caption"): "a text (in quotes if it looks like a number)",
    ("frames", "*", "seed"): "a whole number from 0 to 2**63 - 1",
    ("frames", "*", "characters"): "a list of names, such as [Ann]",
    ("frames", "*", "characters", "*"): "the name of a character",
    ("frames", "*", "boxes"): "a mapping of names to boxes, such as {Ann: [0, 0.2, 0.5, 1]}",
    ("frames", "*", "boxes", "*"): "four fractions of the picture: [left, top, right, bottom]",
    ("frames", "*", "boxes", "*", "*"): "a fraction from 0 to 1",
}


@dataclass(frozen=True)
class _Origin:
    """Where a story comes from, to say what is wrong in it."""

    name: str
    lines: Mapping[Location, int]

    def error(self, location: Location, text: str) -> InputError:
        """An InputError that names the nearest line known for the location, and the location."""
        known = (location[:n] for n in range(len(location), -1, -1) if location[:n] in self.lines)
        place = next((f"{self.name}:{self.lines[part]}" for part in known), self.name)
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
        text += "" if text.endswith((".", "?")) else "."
        return InputError(": ".join(filter(None, [place, path, text])))

    def invalid(self, error: Mapping[str, Any]) -> InputError:
        """One of pydantic's error details in the story file's words."""
        location = tuple(part for part in error["loc"] if part != "[key]")
        pattern = _pattern_of(location)
        if error["type"] == "extra_forbidden":
            known = _ENTRIES[pattern[:-1]].model_fields
            todo = f"{_nearest(str(location[-1]), known) or '.'} Known here: {', '.join(known)}."
            if pattern[0] == "frames":
                todo += ' A caption that holds ": " needs quotes.'
            return self.error(location, f"unknown key{todo}")
        if error["type"] == "value_error":
            return self.error(location, str(error["ctx"]["error"]))
        got = "nothing" if error["type"] == "missing" else _describe(error["input"])
        return self.error(location, f"wanted {_WANTED[pattern]}, got {got}")


def _pattern_of(location: Location) -> Location:
    """("frames", 2, "seed") -> ("frames", "*", "seed"), a key of _WANTED; characters' names become * too."""
    before = ("", *location)
    return tuple(
        "*"
        if isinstance(part, int) or previous == "boxes" or (i == 1 and location[0] == "characters")
        else part
        for i, (part, previous) in enumerate(zip(location, before, strict=False))
    )


def _describe(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value[:60] + '…' if len(value) > 60 else value!r}"
    if isinstance(value, int | float):
        # Python refuses to print an int of thousands of digits
        return "a huge number" if 10**30 < abs(value) < float("inf") else f"the number {value}"
    if isinstance(value, list | tuple | dict):
        kind = "mapping" if isinstance(value, dict) else "list"
        return f"a {kind} of {len(value)}" if value else f"an empty {kind}"
    return f"a {type(value).__name__}"


def _nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


# From what is said to a Story.


def _build(origin: _Origin, data: Any, source: Path | None) -> Story:
    _check_version(origin, data)
    _check_length(origin, data)
    try:
        entry = _StoryEntry.model_validate(data)
    except ValidationError as error:
        # one message at a time; a misspelt key explains the missing one
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise origin.invalid(details[0]) from None
    pictures = _Pictures(origin, source.parent if source else None)
    characters = _characters(origin, entry, pictures)
    names = {character.name.casefold(): character.name for character in characters}
    first_frame = entry.first_frame and pictures.path(("first_frame",), entry.first_frame)
    return Story(
        title=entry.title or _title_of(source),
        frames=tuple(_frame(origin, i, frame, names) for i, frame in enumerate(entry.frames)),
        characters=characters,
        style=entry.style,
        negative_prompt=entry.negative_prompt,
        settings=entry.settings,
        first_frame=first_frame or None,
        source=source,
        lines=origin.lines,
    )


def _check_version(origin: _Origin, data: Any) -> None:
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version == SCHEMA:
        return  # the schema says what is wrong with other types
    if version > SCHEMA:
        text = f"wanted schema version {SCHEMA}, got {_describe(version)}, which is newer: update fastory"
    else:
        text = f"wanted schema version {SCHEMA}, got {_describe(version)}: write version: {SCHEMA}"
    raise origin.error(("version",), text)


def _check_length(origin: _Origin, data: Any) -> None:
    frames = data.get("frames") if isinstance(data, dict) else None
    if isinstance(frames, list) and len(frames) > MAX_FRAMES:
        raise origin.error(("frames", MAX_FRAMES), _TOO_MANY)


def _title_of(source: Path | None) -> str:
    try:
        # a file name may hold bytes that are no text
        return _visible(source.stem) if source else "story"
    except ValueError:
        return "story"


def _characters(origin: _Origin, entry: _StoryEntry, pictures: _Pictures) -> tuple[Character, ...]:
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


def _frame(origin: _Origin, i: int, entry: _FrameEntry, names: Mapping[str, str]) -> Frame:
    def known(name: str, *location: str | int) -> str:
        if name.casefold() not in names:
            todo = _nearest(name, names.values()) or ": add it to `characters:`"
            wanted = f"wanted one of the story's characters ({', '.join(names.values()) or 'none'})"
            raise origin.error(("frames", i, *location), f"{wanted}, got {_describe(name)}{todo}")
        return names[name.casefold()]

    characters = dict.fromkeys(known(name, "characters", k) for k, name in enumerate(entry.characters))
    boxes = {known(name, "boxes", name): (b[0], b[1], b[2], b[3]) for name, b in entry.boxes.items()}
    return Frame(entry.caption, entry.seed, tuple(characters), tuple(boxes.items()))


class _Pictures:
    """The pictures that a story names, each looked for and decoded once however often it is named."""

    def __init__(self, origin: _Origin, folder: Path | None) -> None:
        self._origin, self._folder = origin, folder
        self._paths: dict[str, Path] = {}
        self._decoded: set[Path] = set()

    def path(self, location: Location, given: str) -> Path:
        """The absolute path of a picture that lies in the story's folder and can be decoded."""
        if given not in self._paths:
            path = self._inside(location, given)
            if path not in self._decoded:
                try:
                    check_picture(path, shown(given, 200))
                except InputError as error:
                    raise self._origin.error(location, str(error)) from error
                self._decoded.add(path)
            self._paths[given] = path
        return self._paths[given]

    def _inside(self, location: Location, given: str) -> Path:
        error, name = self._origin.error, shown(given, 200)
        if self._folder is None:
            raise error(location, "wanted captions alone, got a picture: read the story from a file")
        try:
            root = self._folder.resolve()
            path = (root / given).resolve()
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


def _picture_digest(path: Path) -> str:
    try:
        return files.sha256_of(path)
    except OSError as error:
        raise InputError(
            f"{path}: wanted the picture that was there when the story was read: {error}."
        ) from error


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder.resolve())).as_posix()


def _without_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None and value not in ([], {})}


def _character_data(character: Character, folder: Path) -> dict[str, Any]:
    references = [_relative(path, folder) for path in character.references]
    data = {"prompt": character.prompt, "references": references, "scale": character.scale}
    return _without_defaults(data)


def _frame_data(frame: Frame) -> str | dict[str, Any]:
    boxes = {name: list(box) for name, box in frame.boxes}
    data = {
        "caption": frame.caption,
        "seed": frame.seed,
        "characters": list(frame.characters),
        "boxes": boxes,
    }
    data = _without_defaults(data)
    return frame.caption if data.keys() == {"caption"} else data
