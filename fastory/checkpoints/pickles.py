"""Turning a pickle of tensors into safetensors, once, without running what else it may hold."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import torch

from fastory import files
from fastory.checkpoints.weights import PICKLE_SUFFIXES
from fastory.checkpoints.writing import DOING, HINT, KEPT, is_converted_file, same_tensors, save_tensors
from fastory.errors import InputError


def convert_pickle(path: Path, output: Path | None = None, *, overwrite: bool = False) -> Path:
    """Writes the tensors of a .bin, .ckpt or .pt file as safetensors and returns the file's path.

    Nested mappings are flattened with dots ({"image_proj": {"latents": ...}} gives image_proj.latents); of
    a training checkpoint only its state_dict is kept. The default output lies beside the input, under the
    name the libraries look for. Raises InputError for input that is not tensors alone and for an existing
    output of other content.
    """
    return write_tensors(read_pickle(path), output or beside(path), overwrite=overwrite)


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin, .ckpt or .pt file by name, as they lie on the disk: nothing large is read yet.

    Raises InputError for input that is not tensors alone, is damaged or has another suffix.
    """
    if path.suffix.lower() not in PICKLE_SUFFIXES or not path.is_file():
        raise InputError(f"{path} cannot be converted: wanted a file ending in {', '.join(PICKLE_SUFFIXES)}.")
    tensors = dict(_flattened(path, _contents(path)))
    if not tensors:
        raise InputError(f"{path} holds no tensors.")
    return tensors


def write_tensors(tensors: Mapping[str, torch.Tensor], output: Path, *, overwrite: bool = False) -> Path:
    """Writes tensors as a safetensors file; an existing one is kept, and refused where it holds something else."""
    if output.suffix != ".safetensors":
        raise InputError(f"Output {output} must end in .safetensors.")
    # Copies of their own: safetensors refuses tensors that share memory.
    _write({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, output, overwrite)
    return output


def beside(path: Path) -> Path:
    """The .safetensors file next to a pickle, under the name the libraries look for."""
    stem = "model" if path.stem == "pytorch_model" else path.stem  # transformers' two names for the same file
    return path.with_name(stem + ".safetensors")


def _contents(path: Path) -> Mapping[object, object]:
    try:
        # Of a file of many gigabytes only what is used is read, and optimizer states never are.
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is refused: it holds more than tensors, and reading it could run any program "
            f"({str(error).splitlines()[0]}). If you trust where it came from, save its state_dict alone with "
            "torch.save and convert that file."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, BadZipFile, LookupError) as error:
        raise InputError(
            f"{path} cannot be read: {error}. It was cut short or is no pickle of tensors."
        ) from error
    if not isinstance(contents, Mapping):
        raise InputError(f"{path} holds a {type(contents).__name__}; wanted named tensors.")
    inner = contents.get("state_dict")
    return inner if isinstance(inner, Mapping) else contents


def _flattened(
    path: Path, contents: Mapping[object, object], prefix: str = ""
) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in contents.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            yield name, value.detach()
        elif isinstance(value, Mapping):
            yield from _flattened(path, value, f"{name}.")
        else:
            raise InputError(f"{path} is refused: {name} is a {type(value).__name__}; wanted tensors alone.")


def _write(tensors: dict[str, torch.Tensor], output: Path, overwrite: bool) -> None:
    """Writes beside the output and renames, so that a reader never sees half a file."""
    with files.disk_errors(output, KEPT), files.unfinished(output, DOING, HINT) as place:
        written = place / output.name
        files.write(written, lambda path: save_tensors(path, tensors))
        if output.exists():
            if same_tensors(written, output):
                return
            _check_replaced(output, overwrite)
        files.sync(written)
        files.replace(written, output)


def _check_replaced(output: Path, overwrite: bool) -> None:
    """InputError for a file that is to be kept, or is not ours."""
    if not overwrite:
        raise InputError(f"{output} exists and holds something else; give another --output, or --overwrite.")
    if not is_converted_file(output):
        raise InputError(
            f"{output} is not known as a file of `fastory convert` (or an older version wrote it), and --overwrite "
            "replaces nothing else; move it away, or give another --output."
        )
