"""A story: captions, characters and how they should look. Read from .txt, .yaml or .json and checked."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fastory.errors import InputError

SCHEMA = 1
MAX_BYTES = 2**20  # a thousand captions of a thousand characters; PyYAML takes seconds for each megabyte
MAX_DEPTH = 32  # of nested brackets; what lies deeper can only be meant to exhaust the stack
MAX_SEED = 2**63 - 1
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's EPS reader would start Ghostscript

STYLES = {
    "comic": "comic book panel, {prompt}, bold ink outlines, flat colours",
    "film": "film still, {prompt}, cinematic lighting, shallow depth of field",
    "realistic": "photograph, {prompt}, natural light, fine detail",
    "none": "{prompt}",
}

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
    first_frame: reserved: absolute path of a given first picture. Checked, not used yet.
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
        readers = {".txt": _read_txt, ".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json}
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
        return _build(_Origin("captions", {}), {"title": title, "frames": list(captions)}, None)

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
        caption = self.frames[i].caption
        introduced: set[str] = set()

        def introduce(match: re.Match[str]) -> str:
            character = self._named(match)
            if character.prompt is None or character.name in introduced:
                return match[0]
            introduced.add(character.name)
            closed = re.match(r"\s*([,.;:!?)\]…]|$)", caption[match.end() :])  # its own punctuation follows
            return f"{match[0]}, {character.prompt}" + ("" if closed else ",")

        described = self._pattern().sub(introduce, caption)
        template = style_template(self.style if style is None else style)
        if not template.endswith("{prompt}"):
            described = described.removesuffix(".")  # the sentence goes on
        return template.replace("{prompt}", described)

    def cast(self, i: int) -> frozenset[str]:
        """Names of the characters in frame i: whole words of its caption, in any case, or in its own list."""
        frame = self.frames[i]
        named = {self._named(match).name for match in self._pattern().finditer(frame.caption)}
        return frozenset(named.union(frame.characters))

    def _pattern(self) -> re.Pattern[str]:
        """Any character's name, in the group `c<index>`; 'Mary Ann' before 'Mary'."""
        if not self.characters:
            return re.compile(r"(?!)")
        longest_first = sorted(enumerate(self.characters), key=lambda item: -len(item[1].name))
        names = "|".join(f"(?P<c{k}>{re.escape(character.name)})" for k, character in longest_first)
        # `Ann's` is Ann, and no prompt may come between the two parts of the word
        return re.compile(rf"(?<!\w)(?:{names})(?:['’]s)?(?!\w)", re.IGNORECASE)

    def _named(self, match: re.Match[str]) -> Character:
        return self.characters[int((match.lastgroup or "c0")[1:])]

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
        pictures = {path: _picture_digest(path) for path in self._pictures()}
        cast = [[c.name, c.prompt, [pictures[p] for p in c.references], c.scale] for c in self.characters]
        first_frame = pictures[self.first_frame] if self.first_frame else None
        return _sha256([self.title, self.style, self.negative_prompt, cast, first_frame, len(self.frames)])

    def _pictures(self) -> set[Path]:
        first = {self.first_frame} if self.first_frame else set()
        return first.union(*(character.references for character in self.characters))

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
        _refuse_aliases_and_depth(text, name)
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
    try:
        data = json.loads(text)
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
    # JSON is YAML but for tabs between values (within texts they are escaped) and a few characters. So YAML
    # finds the lines; the values are JSON's own, as the two escape characters beyond U+FFFF differently.
    text = yaml.reader.Reader.NON_PRINTABLE.sub("?", text.replace("\t", " "))
    text = re.sub("[\x85\u2028\u2029]", "?", text)  # line ends for YAML alone
    lines: dict[Location, int] = {(): 1}
    try:
        _refuse_aliases_and_depth(text, name)
        _record_lines(_Loader(text).get_single_node(), (), lines, name)
    except yaml.YAMLError:
        lines.clear()  # a layout that YAML cannot follow, such as a colon on a line of its own
    return data, lines


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


def _refuse_aliases_and_depth(text: str, name: str) -> None:
    """Aliases let a short file grow to any size, and depth exhausts the stack; events suffer from neither."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        place = f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if isinstance(event, yaml.AliasEvent):
            raise InputError(
                f"{place}: wanted plain YAML, got the alias *{event.anchor}: write the value out."
            )
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
    try:
        entry = _StoryEntry.model_validate(data)
    except ValidationError as error:
        # one message at a time; a misspelt key explains the missing one
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise origin.invalid(details[0]) from None
    folder = source.parent if source else None
    characters = _characters(origin, entry, folder)
    names = {character.name.casefold(): character.name for character in characters}
    first_frame = entry.first_frame and _picture(origin, ("first_frame",), entry.first_frame, folder)
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


def _title_of(source: Path | None) -> str:
    try:
        # a file name may hold bytes that are no text
        return _visible(source.stem) if source else "story"
    except ValueError:
        return "story"


def _characters(origin: _Origin, entry: _StoryEntry, folder: Path | None) -> tuple[Character, ...]:
    characters: dict[str, Character] = {}
    for name, said in entry.characters.items():
        location: Location = ("characters", name)
        if name.casefold() in characters:
            other = characters[name.casefold()].name
            text = f"wanted names that differ in more than case, got {other!r} and {name!r}: rename one"
            raise origin.error(location, text)
        references = tuple(
            _picture(origin, (*location, "references", i), reference, folder)
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


def _picture(origin: _Origin, location: Location, given: str, folder: Path | None) -> Path:
    """The absolute path of a picture that lies in the story's folder and can be decoded."""
    if folder is None:
        raise origin.error(location, "wanted captions alone, got a picture: read the story from a file")
    try:
        root = folder.resolve()
        path = (root / given).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise origin.error(location, f"wanted the path of a picture, got {given!r} ({error})") from error
    if not path.is_relative_to(root):
        raise origin.error(
            location, f"wanted a picture in the story's folder, got {given!r} outside it: copy it there"
        )
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise origin.error(
            location, f"wanted a picture, got {given!r}, {got}: paths start at the story's folder"
        )
    problem = _decoding_problem(path)
    if problem:
        raise origin.error(
            location, f"wanted a picture ({', '.join(PICTURE_FORMATS)}), got {given!r}, {problem}"
        )
    return path


def _decoding_problem(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head[:1] == b"\x80" or head == b"PK\x03\x04":  # pickle protocol 2 and later; torch.save's zip
            return "a pickle or an archive, which is never opened: save the picture as PNG"
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PICTURE_FORMATS) as image:
                image.verify()
            with Image.open(path, formats=PICTURE_FORMATS) as image:  # verify leaves the image unusable
                image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"of more than {Image.MAX_IMAGE_PIXELS} pixels: make it smaller"
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
    except Exception as error:
        return f"which cannot be decoded ({error}): save it anew as PNG"
    return None


# From a Story to texts and hashes.


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _picture_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
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
