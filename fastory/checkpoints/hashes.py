"""Hashes of weight files, remembered by place, size and times, since gigabytes take long to read.

A file's time of modification can be set back, and tools that copy do so. The time of the last change of its inode
cannot, so it is part of the key; and what was changed a moment ago is not remembered, as a clock's tick is coarse.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fastory.documents import read_json
from fastory.errors import FastoryError, InputError
from fastory.files import atomic_write, cache_folder, folder_for, locked_folder, sha256_of

TICK = 100_000_000  # ns; file systems of this decade count in 10 ms or less


def model_hashes(sources: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of each weight file, by its name in its model folder
    (`unet/diffusion_pytorch_model.safetensors`).

    A file outside a diffusers folder goes by its own name; a name that comes twice gets its number
    appended. No other path and no time enters the result, so it is the same on every machine.
    """
    remembered = _read()
    hashes: dict[str, str] = {}
    known = dict(remembered)
    for source in sources:
        hashes[_name(source, hashes)] = _remembered_hash(source, known)
    if known != remembered:
        _write(known)
    return hashes


def file_hash(file: Path) -> str:
    """The SHA-256 of any file, remembered in the same way. A stranger's file is read in full by `sha256_of`."""
    remembered = _read()
    known = dict(remembered)
    digest = _remembered_hash(file, known)
    if known != remembered:
        _write(known)
    return digest


def _remembered_hash(file: Path, known: dict[str, str]) -> str:
    """The hash by `known`, to which a new one is added where the file has been as it is for a while."""
    key, began = _key(file), time.time_ns()
    if key in known:
        return known[key]
    digest = sha256_of(file)
    state = file.stat()
    if _key(file) == key and max(state.st_ctime_ns, state.st_mtime_ns) + TICK < began:
        for old in [name for name in known if name.startswith(f"{key.rsplit('|', 5)[0]}|")]:
            del known[old]
        known[key] = digest
    return digest


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of weights in memory: of every name, type and shape, and of the bytes, in the names' order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _name(source: Path, taken: dict[str, str]) -> str:
    in_model = (source.parent.parent / "model_index.json").is_file()
    name = f"{source.parent.name}/{source.name}" if in_model else source.name
    same = sum(other == name or other.startswith(f"{name}#") for other in taken)
    return f"{name}#{same + 1}" if same else name


def _key(source: Path) -> str:
    state = source.stat()
    numbers = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev)
    return "|".join((str(source.resolve()), *map(str, numbers)))


def _cache_file() -> Path:
    return cache_folder() / "model_hashes.json"


def _read() -> dict[str, str]:
    """What is remembered; a cache that is missing or spoilt only costs the time to hash again."""
    with suppress(InputError, RuntimeError):
        remembered = read_json(_cache_file(), what="remembered hashes")
        if isinstance(remembered, dict) and all(_is_digest(value) for value in remembered.values()):
            return remembered
    return {}


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and value.isalnum()


def _write(known: dict[str, str]) -> None:
    """Keeps the hashes where the place is writable, and no other process writes there, which would share a partial file."""
    with suppress(FastoryError, RuntimeError):
        path = _cache_file()
        folder_for(path.parent, "nothing is remembered")
        with locked_folder(path.parent, "remembers hashes in", "nothing is remembered"):
            atomic_write(path, json.dumps(known, indent=0, sort_keys=True).encode())
