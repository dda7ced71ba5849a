"""Hashes of weight files, remembered by path, size and time of change, since gigabytes take long to read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


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
        name = _name(source, hashes)
        key = _key(source)
        if key not in known:
            known[key] = _sha256(source)
        hashes[name] = known[key]
    if known != remembered:
        _write(known)
    return hashes


def file_hash(file: Path) -> str:
    """The SHA-256 of any file, remembered in the same way."""
    remembered, key = _read(), _key(file)
    if key not in remembered:
        remembered[key] = _sha256(file)
        _write(remembered)
    return remembered[key]


def _name(source: Path, taken: dict[str, str]) -> str:
    in_model = (source.parent.parent / "model_index.json").is_file()
    name = f"{source.parent.name}/{source.name}" if in_model else source.name
    same = sum(other == name or other.startswith(f"{name}#") for other in taken)
    return f"{name}#{same + 1}" if same else name


def _key(source: Path) -> str:
    state = source.stat()
    return f"{source.resolve()}|{state.st_size}|{state.st_mtime_ns}"


def _sha256(source: Path) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_file() -> Path:
    """Where torch and the hub's client keep their caches as well, on every system."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastory" / "model_hashes.json"


def _read() -> dict[str, str]:
    """What is remembered; a cache that is missing or spoilt only costs the time to hash again."""
    with suppress(OSError, ValueError, RuntimeError):
        remembered = json.loads(_cache_file().read_text(encoding="utf-8"))
        if isinstance(remembered, dict):
            return remembered
    return {}


def _write(known: dict[str, str]) -> None:
    """Keeps the hashes where the place is writable; two processes at once at worst forget a few."""
    with suppress(OSError, RuntimeError):
        path = _cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as file:
            json.dump(known, file, indent=0, sort_keys=True)
        os.replace(file.name, path)
