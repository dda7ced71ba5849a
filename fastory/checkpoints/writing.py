"""What `fastory convert` writes, and how it knows that again: it replaces nothing else.

A file says so in its metadata; a folder has a record of what was converted and of every file that was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastory import __version__, files
from fastory.documents import read_json, validated
from fastory.errors import InputError

DOING, HINT, KEPT = "is writing", "give another output", "Nothing half-written is left."
METADATA = {"converted_by": "fastory", "format": "pt"}  # transformers asks for the format
RECORD, SCHEMA = "fastory_converted.json", 1
WHAT = "the record of a conversion"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    schema_: Literal[1] = Field(alias="schema")
    fastory: str
    source: Sha256
    config: Sha256 | None
    files: dict[str, Sha256]


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that is known again as converted; equal tensors are equal bytes."""
    save_file(dict(tensors), path, METADATA)
    with path.open("r+b") as file:  # safetensors has the keys of metadata in an order of chance
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = METADATA
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:
            raise ValueError(f"{path}: wanted a header of at most {size} bytes, got {len(text)}")
        file.seek(8)
        file.write(text.ljust(size))


def is_converted_file(path: Path) -> bool:
    """Whether `fastory convert` wrote a .safetensors file."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("converted_by") == METADATA["converted_by"]
    except (OSError, SafetensorError):
        return False


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two .safetensors files hold the same, whatever their metadata; False where `other` is no such file."""
    try:
        with safe_open(first, "np"), safe_open(second, "np"):  # both headers are sound
            return _tensor_bytes(first) == _tensor_bytes(second)
    except (OSError, SafetensorError):
        return False


def _tensor_bytes(path: Path) -> tuple[dict[str, object], str]:
    """A file's header without metadata, and the sha256 of what follows it."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        return header, hashlib.file_digest(file, "sha256").hexdigest()


def write_record(folder: Path, source: str, config: str | None) -> None:
    """Name every file below `folder` in its record, which is written last."""
    said = {
        "schema": SCHEMA,
        "fastory": __version__,
        "source": source,
        "config": config,
        "files": {name: files.sha256_of(folder / name) for name in names_below(folder)},
    }
    files.write(folder / RECORD, (json.dumps(said, indent=1, sort_keys=True) + "\n").encode())


def names_below(folder: Path) -> list[str]:
    """Every file and link below `folder` but the record: relative names, sorted."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found if path != folder / RECORD)


def read_record(folder: Path) -> _Record:
    """The record of a converted folder. Raises InputError for a folder without one, and a damaged one."""
    file = folder / RECORD
    if folder.is_symlink() or not file.is_file():
        raise InputError(
            f"{folder} has no {RECORD}: `fastory convert` did not write it, or an older version did; it replaces "
            "nothing else. Move it away, or give another output"
        )
    todo = f"move {folder} away, or {HINT}"
    return validated(_Record, read_json(file, what=WHAT, todo=todo), file, what=WHAT, todo=todo)


def refuse_other_files(folder: Path) -> None:
    """InputError for a folder that is not converted, or holds a file that its record does not list."""
    record = read_record(folder)
    if other := [name for name in names_below(folder) if name not in record.files]:
        raise InputError(
            f"{folder} holds {other[0]}, which `fastory convert` did not write; move it away, or give another output"
        )


def holds_conversion(folder: Path, source: str, config: str | None) -> bool:
    """Whether a folder is, to the last byte, what this version made of the same checkpoint and configs."""
    try:
        record = read_record(folder)
    except InputError:
        return False
    same = (record.fastory, record.source, record.config) == (__version__, source, config)
    if not same or names_below(folder) != sorted(record.files):
        return False
    return all(files.sha256_of(folder / name) == digest for name, digest in record.files.items())


def digest_of_configs(folder: Path | None) -> str | None:
    """One sha256 of the configs and vocabularies below --config, all that is read there but weights."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".txt") and path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()} {files.sha256_of(path)}\n".encode())
    return digest.hexdigest()
