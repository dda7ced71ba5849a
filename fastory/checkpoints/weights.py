"""Finding weight files and looking into them before a tensor is read. Safetensors only, no pickles."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fastory.errors import InputError

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
# The names diffusers and transformers save under, whole or in shards listed by an index.
NAMES = ("diffusion_pytorch_model", "model")
VARIANTS = ("", ".fp16")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a safetensors file, from its header; the file's length is checked
    against it.

    Raises InputError for a missing file, a pickle, a truncated file and anything that is not safetensors.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; wanted a .safetensors file.")
    if not path.is_file():
        raise InputError(f"Weight file {path} does not exist.")
    refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        return "it is the placeholder Git LFS leaves; run `git lfs pull` where it was cloned."
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "it holds a pickle; rename it to .bin and run `fastory convert` on it."
    return f"{error}. It was cut short or is of another kind; download it again."


def refuse_pickle(path: Path) -> None:
    """Raises InputError with the command that converts the file, if its name is that of a pickle."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(
            f"{path} is a pickle, and reading one can run any program; only .safetensors is read. "
            f"Convert it once with:\n  fastory convert {shlex.quote(str(path))}"
        )


def component_weights(folder: Path) -> tuple[str | None, tuple[Path, ...]]:
    """The weight files of one part of a diffusers folder, and their variant (None or "fp16").

    The files without a variant come first, as in diffusers. Raises InputError where there are only pickles
    or nothing.
    """
    for variant in VARIANTS:
        for name in NAMES:
            files = _saved_under(folder, name, variant)
            if files:
                return variant.removeprefix(".") or None, files
    pickles = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        commands = "".join(f"\n  fastory convert {shlex.quote(str(path))}" for path in pickles)
        raise InputError(
            f"{folder} holds its weights as pickles only, and reading one can run any program; only "
            f".safetensors is read. Convert once with:{commands}"
        )
    raise InputError(f"{folder} holds no weights: wanted {NAMES[0]}.safetensors or {NAMES[1]}.safetensors.")


def _saved_under(folder: Path, name: str, variant: str) -> tuple[Path, ...]:
    whole = folder / f"{name}{variant}.safetensors"
    if whole.is_file():
        return (whole,)
    index = folder / f"{name}.safetensors.index{variant}.json"
    if not index.is_file():
        return ()
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index} names no weight files: wanted a weight_map.")
    return tuple(folder / str(shard) for shard in sorted(set(listed.values())))


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file of a model folder; InputError names the file where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; the model folder is incomplete.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; wanted a JSON object.")
    return value
