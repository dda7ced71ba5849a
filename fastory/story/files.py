"""Story files: their text as plain values, with the line of every key and list item; and a story's values as YAML."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fastory.errors import InputError
from fastory.files import check_names_fit
from fastory.story.schema import MAX_FRAMES, TOO_MANY, Location, Origin, check_length, describe

STORY_FILES = (
    "story.yaml",
    "story.yml",
    "story.json",
    "story.txt",
)  # what a folder with pictures calls its story
MAX_BYTES = 2**20  # a thousand captions of a thousand characters; PyYAML takes seconds for each megabyte
MAX_DEPTH = 32  # of nested brackets; what lies deeper can only be meant to exhaust the stack


def read_document(path: Path) -> tuple[Any, dict[Location, int]]:
    """The values of a story file and the line (from 1) of every key and list item; its suffix tells its form.

    Raises InputError, naming file and line, for what is no text in that form, and for aliases, tags, deep nesting and
    keys that stand there twice.
    """
    check_names_fit([path])
    reader = READERS.get(path.suffix.lower())
    if path.is_dir():
        raise InputError(f"{path}: wanted a story file, got a folder: name the file in it.")
    if reader is None:
        got = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise InputError(f"{path}: wanted a story file ({', '.join(READERS)}), got {got}: rename the file.")
    return reader(_read_text(path), str(path))


def yaml_text(data: Mapping[str, Any]) -> str:
    """`data` as YAML that reads back to the same values."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20)


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
        where = f"{name}:{mark.line + 1}" if mark else name
        said = ", ".join(filter(None, [error.context, error.problem]))
        todo = 'indent with spaces, and put texts that hold ": " or " #" in quotes'
        raise InputError(f"{where}: wanted YAML, but {said}: {todo}.") from error
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
    check_length(Origin(name, {}), data)
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
    """YAML's safe types by the rules of YAML 1.2: `No`, `12:30`, `2024-01-01` are texts, 1e5 is a number.

    ruamel.yaml 0.19 reads `2024-01-01` as a date, `1_000` and keys such as `1:` as numbers, and says nothing of tags and
    aliases: all rules here would stay.
    """


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
        where = f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if isinstance(event, yaml.AliasEvent):
            raise InputError(
                f"{where}: wanted plain YAML, got the alias *{event.anchor}: write the value out."
            )
        if depth == 1 and isinstance(event, yaml.ScalarEvent):
            key = event.value  # or the value of another key, which the next key replaces
        if depth == 2 and key == "frames" and isinstance(event, yaml.NodeEvent):
            frames += 1
            if frames > MAX_FRAMES:
                raise InputError(f"{where}: frames: {TOO_MANY}.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise InputError(
                f"{where}: wanted at most {MAX_DEPTH} nested brackets, got more: flatten the file."
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
    where = f"{name}:{node.start_mark.line + 1}"
    kinds = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}
    if node.tag not in kinds or not isinstance(node, yaml.ScalarNode):
        raise InputError(f"{where}: wanted plain values, got the YAML tag {node.tag!r}: remove the tag.")
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError) as error:  # `!!int x`, and a number of thousands of digits
        raise InputError(
            f"{where}: wanted a value, got {describe(node.value)} ({error}): correct it."
        ) from error


READERS: Mapping[str, Callable[[str, str], tuple[Any, dict[Location, int]]]] = {
    ".txt": _read_txt,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".json": _read_json,
}
