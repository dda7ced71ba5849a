"""Turning a pickle of tensors into safetensors, once, without running what else it may hold."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch

from fastory import files
from fastory.checkpoints.loading import one_line
from fastory.checkpoints.weights import PICKLE_SUFFIXES
from fastory.checkpoints.writing import DOING, HINT, KEPT, is_converted_file, same_tensors, save_tensors
from fastory.errors import InputError
from fastory.model_names import local_path
from fastory.runtime import is_out_of_memory

MOST_LEVELS = 32  # of mappings in mappings
MOST_ENTRIES = 1_000_000
MOST_LETTERS = 1000
MOST_REPEATED = 2**30  # bytes that a tensor may have beyond its memory: an expanded one is written in full
KINDS = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


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
    found = local_path(path, "the pickle")
    if path.suffix.lower() not in PICKLE_SUFFIXES or found is None or not found.is_file():
        shown = str(path) if len(str(path)) <= 300 else f"{str(path)[:60]}..."
        raise InputError(
            f"{shown} cannot be converted: wanted a file ending in {', '.join(PICKLE_SUFFIXES)}."
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _flattened(path, _contents(path)):
        if name in tensors:
            raise InputError(f"{path} is refused: two tensors of it are named {name} when they are flattened")
        _check_tensor(path, name, tensor)
        tensors[name] = tensor
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
            f"({one_line(str(error))}). If you trust where it came from, save its state_dict alone with "
            "torch.save and convert that file."
        ) from error
    # A damaged pickle makes torch raise anything: AttributeError, TypeError, AssertionError, RecursionError ...
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{path} cannot be read: {type(error).__name__}: {one_line(str(error))}. It was cut short or is no pickle of "
            "tensors."
        ) from error
    if not isinstance(contents, Mapping):
        raise InputError(f"{path} holds a {type(contents).__name__}; wanted named tensors.")
    inner = contents.get("state_dict")
    return inner if isinstance(inner, Mapping) else contents


def _flattened(path: Path, contents: Mapping[object, object]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of nested mappings in their order. A mapping may hold itself, so depth and count are bounded."""
    levels = [("", iter(contents.items()))]
    for _ in range(MOST_ENTRIES):
        prefix, entries = levels[-1]
        entry = next(entries, None)
        if entry is None:
            levels.pop()
            if not levels:
                return
            continue
        key, value = entry
        name = f"{prefix}{_checked(path, key)}"
        if isinstance(value, torch.Tensor):
            yield name, value.detach()
        elif not isinstance(value, Mapping):
            shown = name if len(name) <= 60 else f"{name[:60]}..."
            raise InputError(f"{path} is refused: {shown} is a {type(value).__name__}; wanted tensors alone.")
        elif len(levels) > MOST_LEVELS:
            raise InputError(
                f"{path} is refused: {name[:60]}... is in more than {MOST_LEVELS} mappings, one in the other"
            )
        else:
            levels.append((f"{name}.", iter(value.items())))
    raise InputError(f"{path} is refused: it has more than {MOST_ENTRIES} entries")


def _checked(path: Path, key: object) -> str:
    """A part of a tensor's name. InputError for what no safetensors file can have as one."""
    name = str(key)
    if (
        not isinstance(key, str | int)
        or len(name) > MOST_LETTERS
        or (not name.isascii() and not _is_text(name))
    ):
        raise InputError(f"{path} is refused: a name in it is {ascii(name)[:60]}; wanted text")
    return name


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _check_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    """InputError for a kind of tensor that safetensors has not, and for one larger than the file that it is from."""
    said = (
        "has no data (it is of the device meta)" if tensor.is_meta
        else f"is {str(tensor.layout).removeprefix('torch.')}" if tensor.layout != torch.strided
        else f"is quantised ({str(tensor.dtype).removeprefix('torch.')})" if tensor.is_quantized
        else f"is of type {str(tensor.dtype).removeprefix('torch.')}" if tensor.dtype not in KINDS
        else ""
    )  # fmt: skip
    if said:
        raise InputError(f"{path} is refused: {name[:200]} {said}; wanted dense tensors of plain numbers")
    size = tensor.numel() * tensor.element_size()
    if size > max(MOST_REPEATED, tensor.untyped_storage().nbytes()):
        raise InputError(f"{path} is refused: {name[:200]} would repeat its numbers up to {size} bytes")


def _write(tensors: dict[str, torch.Tensor], output: Path, overwrite: bool) -> None:
    """Writes beside the output and renames, so that a reader never sees half a file."""
    with files.disk_errors(output, KEPT), files.unfinished(output, DOING, HINT) as working:
        written = working / output.name
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
