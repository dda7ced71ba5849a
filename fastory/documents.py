"""Reading what others may have written: files of bounded size, JSON of bounded depth and numbers, checked by a schema.

Everything fastory reads from disk that is no tensor and no picture comes through here: manifests, model folders'
configurations and defaults, exports. A file that cannot be used is one InputError that names it and says what to do.
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fastory.errors import InputError

MOST_BYTES = 16 * 2**20  # a manifest of 1000 frames and 11 rounds has 2 MB
MOST_DEPTH = 32
MOST_DIGITS = 40  # of a whole number: a seed has 19

Model = TypeVar("Model", bound=BaseModel)


def read_bytes(path: Path, *, what: str, most: int = MOST_BYTES, todo: str = "check the path") -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    what: the file in the user's words, such as "a manifest"; todo: what to do where it cannot be read. Raises
    InputError for a missing or unreadable file, a folder, and a pipe or device, which would be waited for.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            got = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise InputError(f"{path}: wanted {what}, got {got}; {todo}")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path}: wanted {what}, but {error.strerror or error}; {todo}") from error
    except ValueError as error:  # a NUL in the path
        raise InputError(f"{str(path)!r}: wanted {what}, but {error}; {todo}") from error
    if len(data) > most:
        raise InputError(f"{path}: wanted {what} of at most {most // 2**10} KiB, got more; {todo}")
    return data


def read_json(path: Path, *, what: str, most: int = MOST_BYTES, todo: str = "check the path") -> Any:
    """The values of a JSON file. Raises InputError as `read_bytes` does, and for text that is not JSON as we take it:

    UTF-8, its escapes too, at most 32 nested brackets, whole numbers of at most 40 digits, other numbers finite, no key twice.
    """
    return parse_json(read_bytes(path, what=what, most=most, todo=todo), path, what=what, todo=todo)


def parse_json(data: bytes, path: Path, *, what: str, todo: str) -> Any:
    """`read_json` of bytes at hand; `path` is where they come from."""
    try:
        parsed = json.loads(
            data.decode("utf-8-sig"),
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_unique,
        )
        _check_depth(parsed)
        if b"\\u" in data:  # half of a UTF-16 pair, which can be escaped and not be written again
            json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError:
        said = f"more than {MOST_DEPTH} nested brackets"
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are among them
        said = str(error)
    else:
        return parsed
    raise InputError(f"{path} is damaged ({said}): wanted {what}; {todo}") from None


def validated(model: type[Model], data: Any, path: Path, *, what: str, todo: str) -> Model:
    """`data` as `model` describes it. Raises InputError that names the file, the first wrong key and its value."""
    try:
        return model.model_validate(data)
    except (ValidationError, RecursionError) as error:
        said = _first_problem(error) if isinstance(error, ValidationError) else "nested too deep"
        raise InputError(f"{path} is damaged ({said}): wanted {what}; {todo}") from None


def _first_problem(error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in detail["loc"]) or "the whole file"
    if detail["type"] == "missing":
        return f"no {field!r}"
    shown = repr(detail["input"])
    return f"{field}: {detail['msg'][:1].lower()}{detail['msg'][1:]}, got {shown[:60]}{'…' if len(shown) > 60 else ''}"


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]}")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:60]!r} twice")
    return found


def _check_depth(parsed: Any) -> None:
    """Depth by depth rather than recursively, as the stack is what a deep file is after."""
    level, depth = [parsed], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} nested brackets")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [v for v in value.values() if isinstance(v, dict | list)]
            elif isinstance(value, list):
                inner += [v for v in value if isinstance(v, dict | list)]
        level = inner
