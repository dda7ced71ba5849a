"""Finding weight files and looking into them before a tensor is read. Safetensors only, no pickles."""

from __future__ import annotations

import shlex
import stat
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from fastory import documents
from fastory.checkpoints.loading import loading
from fastory.errors import InputError
from fastory.model_names import PICKLE_SUFFIXES, refuse_pickle

MOST_HEADER = 16 * 2**20  # of a safetensors file: SDXL's has 250 kB
MOST_JSON = 64 * 2**20  # a tokenizer of a large vocabulary has 17 MB
# The names diffusers and transformers save under, whole or in shards listed by an index.
NAMES = ("diffusion_pytorch_model", "model")
VARIANTS = ("", ".fp16")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a safetensors file, from its header; the file's length is checked
    against it.

    Raises InputError for a missing file, a pickle, a truncated file and anything that is not safetensors.
    """
    start = _start(path)
    refuse_pickle(path)
    try:
        if int.from_bytes(start[:8], "little") > MOST_HEADER and len(start) >= 8:
            raise SafetensorError("its header is too large")
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:  # a device of no length cannot be mapped
        raise InputError(f"{path} is not a whole safetensors file: {_reason(start, error)}") from error


def said_of(path: Path) -> dict[str, str]:
    """What the header of a safetensors file, of which `tensor_shapes` knows that it is one, says beside its tensors."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _start(path: Path) -> bytes:
    """The first bytes of a file. InputError for one that cannot be read; a pipe would be waited for."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a folder; wanted a .safetensors file.")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is a pipe or a device; wanted a .safetensors file.")
        with path.open("rb") as file:
            return file.read(40)
    except FileNotFoundError:
        raise InputError(f"Weight file {path} does not exist.") from None
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read ({said}); wanted a .safetensors file.") from error


def _reason(start: bytes, error: Exception) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "it is the placeholder Git LFS leaves; run `git lfs pull` where it was cloned."
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "it holds a pickle; rename it to .bin and run `fastory convert` on it."
    said = " ".join(str(error).split())[:200]
    return f"{said}. It was cut short or is of another kind; download it again."


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
    if is_there(whole):
        return (whole,)
    index = folder / f"{name}.safetensors.index{variant}.json"
    if not is_there(index):
        return ()
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
        raise InputError(f"{index} names no weight files: wanted a weight_map.")
    shards = sorted(set(listed.values()))
    for shard in shards:
        if shard != PurePosixPath(shard).name or "\0" in shard or "\\" in shard:
            raise InputError(f"{index} names the file {shard[:60]!r}; wanted files of its own folder.")
    return tuple(folder / shard for shard in shards)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder; InputError names the file where it is none."""
    if not is_there(path):
        raise InputError(f"{path} does not exist; the model folder is incomplete.")
    value = documents.read_json(
        path, what="a JSON object", most=MOST_JSON, todo="take the file anew from its source"
    )
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; wanted a JSON object.")
    return value


def load_finite(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file on the CPU. InputError where it is damaged, or a number is not finite."""
    tensor_shapes(path)
    with loading(f"{path} cannot be opened"):
        tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(
                f"{path}: {name} holds numbers that are not finite; the file is damaged or was trained too far"
            )
    return tensors


def is_there(path: Path) -> bool:
    """Whether anything has this name, a folder, a pipe or a link to nothing too: what reads it says what is wrong."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{str(path)[:300]} cannot be read ({said}); check the path") from error
    return True


def is_inside(name: object) -> bool:
    """Whether `name`, of a stranger's JSON, is a relative path that leads nowhere else by itself."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    parts = PurePosixPath(name).parts
    return (
        len(name) < 1000
        and not name.startswith("/")
        and ".." not in parts
        and all(len(p) < 200 for p in parts)
    )
