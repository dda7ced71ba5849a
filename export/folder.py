"""The folder of an export: graphs, weights, what reads captions and pictures, and fastory.json, which names them all.

fastory.json            schema, types, sizes, components with their inputs, hashes of all files, and the measured parity
<component>.onnx        the graph; .onnx.data beside it holds its weights
constants.safetensors   tensors that a run needs beside the graphs
tokenizer/ scheduler/ feature_extractor/ ..
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastory import files
from fastory.checkpoints.hashes import file_hash
from fastory.errors import InputError

SCHEMA = 1
MANIFEST = "fastory.json"
DOING, HINT = "exports into", "choose another --output"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportFolder:
    """A finished export. manifest: the contents of fastory.json."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path, check: bool = True) -> ExportFolder:
        """Read fastory.json and, with `check`, compare every file with its hash.

        Raises InputError for a folder without it, a newer schema, and files that are missing, changed or of another export.
        """
        file = path / MANIFEST
        if not file.is_file():
            raise InputError(f"{path} holds no {MANIFEST}; wanted a folder that `fastory export` finished")
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            schema = manifest["schema"]
            listed = dict(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file} is damaged ({error}); export the model anew, into another folder"
            ) from error
        if schema != SCHEMA:
            raise InputError(
                f"{file} has schema {schema}; this version of fastory reads schema {SCHEMA}. Update fastory, or export anew."
            )
        if check:
            check_files(path, listed)
        return cls(path, manifest)

    @property
    def components(self) -> Mapping[str, Any]:
        """What fastory.json says of each component, by name."""
        return self.manifest["components"]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the networks."""
        return DTYPES[self.manifest["dtype"]]

    @property
    def groups(self) -> int:
        """G: groups of references that the UNet was exported for."""
        return int(self.manifest["groups"])


def check_files(path: Path, listed: Mapping[str, str]) -> None:
    """InputError for the first file that is not there, or not as it was written."""
    for name, digest in listed.items():
        file = path / name
        if not file.is_file():
            raise InputError(
                f"{path} is incomplete: {name} is missing; export the model anew with --overwrite"
            )
        if file_hash(file) != digest:
            raise InputError(
                f"{file} is not the file of this export (its SHA-256 is not the one in {MANIFEST}): it was changed, damaged, "
                "or comes from another export; export the model anew with --overwrite"
            )


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but fastory.json, by relative path."""
    return {name: files.sha256_of(folder / name) for name in names_below(folder) if name != MANIFEST}


def names_below(folder: Path) -> list[str]:
    """Every file and link below `folder`: relative names, sorted."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """fastory.json, as a whole: a kill leaves the old one or the new one."""
    files.atomic_write(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def refuse_other_files(folder: Path) -> None:
    """InputError for a folder that is no export, or holds a file that neither its fastory.json lists nor a build makes."""
    manifest = ExportFolder.open(folder, check=False).manifest
    listed = {MANIFEST, *manifest["files"]}
    built = _built(manifest["components"])
    if other := [name for name in names_below(folder) if name not in listed and not built.fullmatch(name)]:
        raise InputError(
            f"{folder} holds {other[0]}, which no export wrote, and --overwrite would delete it; move it away, or {HINT}"
        )


def _built(components: Iterable[str]) -> re.Pattern[str]:
    """Names of what `fastory export --trt` and build_engines.py put beside the graphs, and of what a kill left of it."""
    names = "|".join(map(re.escape, components))
    engines = rf"({names})(\.trt\.onnx|(\.rtx-sm[0-9]+)?\.engine)"
    return re.compile(
        rf"\.?({engines}|engines\.json|build_engines\.(json|py)|timing-[^/]+\.cache|fastory\.json)(\.partial)?"
    )
