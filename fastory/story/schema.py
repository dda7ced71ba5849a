"""What a story file may say: the schema, its bounds, and errors in the file's own words."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

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
MAX_FRAMES = 10_000
MAX_NAME = 200  # letters of a character's name; the search for names in captions counts on an end
MAX_SEED = 2**63 - 1
TOO_MANY = f"wanted at most {MAX_FRAMES} frames, got more: split the story"

STYLES = {
    "comic": "comic book panel, {prompt}, bold ink outlines, flat colours",
    "film": "film still, {prompt}, cinematic lighting, shallow depth of field",
    "realistic": "photograph, {prompt}, natural light, fine detail",
    "none": "{prompt}",
}

Location = tuple[str | int, ...]


def style_template(style: str | None) -> str:
    """The text with {prompt} that a style stands for. Raises InputError for an unknown name."""
    if style is None:
        return "{prompt}"
    if "{prompt}" in style:
        return style
    if style.lower() in STYLES:
        return STYLES[style.lower()]
    hint = nearest(style.lower(), STYLES)
    raise InputError(
        f"style: wanted {', '.join(STYLES)} or a text with {{prompt}}, got {describe(style)}{hint}."
    )


def _clean(text: str) -> str:
    """One line in NFC, as the tokenizers read it. Refuses what no file or page can hold."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise ValueError(f"wanted text, got the control character U+{ord(character):04X}: remove it")
    return text


def visible(text: str) -> str:
    """`text` cleaned; ValueError where nothing of it can be seen."""
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


Text = Annotated[str, AfterValidator(visible)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _empty_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class CharacterEntry(_Strict):
    """What it says of a character."""

    prompt: Text | None = None
    references: list[str] = []
    scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class FrameEntry(_Strict):
    """One of its frames."""

    caption: Text
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    characters: list[Text] = []
    boxes: dict[
        Text, Annotated[list[Fraction], Field(min_length=4, max_length=4), AfterValidator(_ordered)]
    ] = {}
    masks: dict[Text, str] = {}


class StoryEntry(_Strict):
    """A story file."""

    version: int = SCHEMA
    title: Text | None = None
    style: Annotated[str, AfterValidator(_style)] | None = None
    negative_prompt: Annotated[str, AfterValidator(_clean)] | None = None
    settings: Annotated[dict[str, Any], AfterValidator(_encodable)] = {}
    first_frame: str | None = None
    initial_pictures: list[str] = []
    characters: dict[Text, Annotated[CharacterEntry, BeforeValidator(lambda value: value or {})]] = {}
    frames: Annotated[
        list[
            Annotated[
                FrameEntry,
                BeforeValidator(lambda value: {"caption": value} if isinstance(value, str) else value),
            ]
        ],
        Field(min_length=1),
    ]


_ENTRIES: dict[Location, type[_Strict]] = {
    (): StoryEntry,
    ("characters", "*"): CharacterEntry,
    ("frames", "*"): FrameEntry,
}
_WANTED: dict[Location, str] = {
    (): "a mapping with `frames:` and perhaps title, style, characters, settings",
    ("version",): f"the number {SCHEMA}",
    ("title",): "a text (in quotes if it looks like a number)",
    ("style",): f"{', '.join(STYLES)} or a text with {{prompt}}",
    ("negative_prompt",): "a text",
    ("settings",): "a mapping of settings, such as {steps: 50}",
    ("first_frame",): "the path of a picture in the story's folder",
    ("initial_pictures",): "a list of pictures, such as [start.png]",
    ("initial_pictures", "*"): "the path of a picture in the story's folder",
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
    ("frames", "*", "masks"): "a mapping of names to pictures, such as {Ann: ann-mask.png}",
    (
        "frames",
        "*",
        "masks",
        "*",
    ): "the path of a picture in the story's folder, white where the character is",
}


@dataclass(frozen=True)
class Origin:
    """Where a story comes from, to say what is wrong in it."""

    name: str
    lines: Mapping[Location, int]

    def error(self, location: Location, text: str) -> InputError:
        """An InputError that names the nearest line known for the location, and the location."""
        known = (location[:n] for n in range(len(location), -1, -1) if location[:n] in self.lines)
        where = next((f"{self.name}:{self.lines[part]}" for part in known), self.name)
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
        text += "" if text.endswith((".", "?")) else "."
        return InputError(": ".join(filter(None, [where, path, text])))

    def invalid(self, error: Mapping[str, Any]) -> InputError:
        """One of pydantic's error details in the story file's words."""
        location = tuple(part for part in error["loc"] if part != "[key]")
        pattern = _pattern_of(location)
        if error["type"] == "extra_forbidden":
            known = _ENTRIES[pattern[:-1]].model_fields
            todo = f"{nearest(str(location[-1]), known) or '.'} Known here: {', '.join(known)}."
            if pattern[0] == "frames":
                todo += ' A caption that holds ": " needs quotes.'
            return self.error(location, f"unknown key{todo}")
        if error["type"] == "value_error":
            return self.error(location, str(error["ctx"]["error"]))
        got = "nothing" if error["type"] == "missing" else describe(error["input"])
        return self.error(location, f"wanted {_WANTED[pattern]}, got {got}")


def _pattern_of(location: Location) -> Location:
    """("frames", 2, "seed") -> ("frames", "*", "seed"), a key of _WANTED; characters' names become * too."""
    before = ("", *location)
    return tuple(
        "*"
        if isinstance(part, int) or previous in ("boxes", "masks") or (i == 1 and location[0] == "characters")
        else part
        for i, (part, previous) in enumerate(zip(location, before, strict=False))
    )


def describe(value: object) -> str:
    """A value in the words of a story file, such as "an empty list"."""
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


def nearest(word: str, known: Iterable[str]) -> str:
    """A question that names the known word nearest to `word`; "" where none is near."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_entry(origin: Origin, data: Any) -> StoryEntry:
    """The values of a story file as the schema takes them. Raises InputError for the first that it does not."""
    _check_version(origin, data)
    check_length(origin, data)
    try:
        return StoryEntry.model_validate(data)
    except ValidationError as error:
        # one message at a time; a misspelt key explains the missing one
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise origin.invalid(details[0]) from None


def _check_version(origin: Origin, data: Any) -> None:
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version == SCHEMA:
        return  # the schema says what is wrong with other types
    if version > SCHEMA:
        text = f"wanted schema version {SCHEMA}, got {describe(version)}, which is newer: update fastory"
    else:
        text = f"wanted schema version {SCHEMA}, got {describe(version)}: write version: {SCHEMA}"
    raise origin.error(("version",), text)


def check_length(origin: Origin, data: Any) -> None:
    """InputError for more frames than a story may have."""
    frames = data.get("frames") if isinstance(data, dict) else None
    if isinstance(frames, list) and len(frames) > MAX_FRAMES:
        raise origin.error(("frames", MAX_FRAMES), TOO_MANY)
