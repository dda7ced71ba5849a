"""The folder of an export: graphs, weights, what reads captions and pictures, and fastory.json, which names them all.

fastory.json            schema, types, sizes, components with their inputs, hashes of all files, and the measured parity
<component>.onnx        the graph; .onnx.data beside it holds its weights
constants.safetensors   tensors that a run needs beside the graphs
tokenizer/ scheduler/ feature_extractor/ ..
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    model_validator,
)

from fastory import files
from fastory.checkpoints.configs import SCHEDULERS, Number, Size
from fastory.checkpoints.hashes import file_hash
from fastory.checkpoints.weights import is_inside, is_there
from fastory.documents import read_json, validated
from fastory.errors import InputError

SCHEMA = 1
MANIFEST = "fastory.json"
DOING, HINT = "exports into", "choose another --output"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


ANEW = "export the model anew with --overwrite"
# --overwrite replaces what fastory.json lists, and a damaged one lists nothing.
ELSEWHERE = "export the model anew, into another folder"


def _inside(name: str) -> str:
    if not is_inside(name):
        raise ValueError("wanted a file inside the folder")
    return name


# What an export's JSON may name: a file inside the folder, a hash, a name of ours.
Inside = Annotated[str, AfterValidator(_inside)]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_]{0,59}$")]
Count = Annotated[int, Field(ge=0, le=2**31, strict=True)]
Expression = Annotated[str, StringConstraints(pattern=r"^([0-9]{1,6}\*)?[a-z_]{1,60}$")]


class Port(BaseModel):
    """An input or output of a graph: its type, and its axes, fixed or as `4*height`."""

    dtype: Literal["float32", "float16", "bfloat16", "bool", "int32", "int64"]
    shape: list[Count | Expression]


class Described(BaseModel):
    """What fastory.json says of a component."""

    model_config = ConfigDict(extra="ignore")

    file: Inside
    data: Inside
    inputs: dict[Name, Port]
    outputs: dict[Name, Port]
    ranges: dict[Name, tuple[Count, Count]]
    hot: dict[Name, Count] = {}


class ExportManifest(BaseModel):
    """What every reader of fastory.json needs."""

    model_config = ConfigDict(extra="ignore")

    dtype: Literal["float32", "float16", "bfloat16"]
    groups: Annotated[Size, Field(le=10_000)]
    characters: Annotated[Count, Field(le=10_000)] = 0
    boxes: StrictBool = False
    binding: Literal["ort", "portable", "trt"]
    size_factor: Annotated[Size, Field(le=10_000)]
    vae_factor: Annotated[Size, Field(le=10_000)]
    files: dict[Inside, Digest]
    components: dict[Name, Described]
    identity: dict[str, Any] = {}


class ExportedUNet(BaseModel):
    """The UNet's sizes."""

    in_channels: Size
    block_out_channels: list[Size]
    cross_attention_dim: Size
    time_cond_proj_dim: Size | None
    parameters: Size


class ExportedVae(BaseModel):
    """What decoding reads."""

    dtype: Literal["float32", "float16", "bfloat16"]
    scaling_factor: Annotated[Number, Field(gt=0)]
    latents_mean: list[Number] | None
    latents_std: list[Annotated[Number, Field(gt=0)]] | None


class DrawableManifest(ExportManifest):
    """What drawing needs beside that."""

    name: Annotated[str, StringConstraints(max_length=500)]
    family: Literal["sd15", "sdxl"]
    tokens_per_ref: Annotated[Size, Field(le=10_000)]
    native_size: tuple[Annotated[Size, Field(le=100_000)], Annotated[Size, Field(le=100_000)]]
    width: Size
    defaults: dict[str, Any]
    unet: ExportedUNet
    vae: ExportedVae
    pooled_width: Size | None
    force_zeros_for_empty_prompt: StrictBool
    history: dict[str, Any] | None
    scheduler: Literal[SCHEDULERS]  # type: ignore[valid-type]
    distilled: Literal["lcm-lora"] | None = None  # since 2026-11
    layer_channels: list[Size] | None = None  # since 2026-11

    @model_validator(mode="after")
    def _are_as_wide(self) -> DrawableManifest:
        if self.layer_channels is not None and 2 * sum(self.layer_channels) != self.width:
            raise ValueError(f"layer_channels: wanted keys and values of {self.width} channels in all")
        return self


@dataclass(frozen=True)
class ExportFolder:
    """A finished export. manifest: the contents of fastory.json."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        path: Path,
        check: bool = True,
        trust_cache: bool = False,
        schema: type[ExportManifest] = ExportManifest,
    ) -> ExportFolder:
        """Read fastory.json and, with `check`, compare every file with its hash.

        trust_cache: a file whose size, inode and times are those of its last hashing is not read again. schema: what the
        manifest must hold. Raises InputError for a folder without it, a newer schema, names that lead out of the folder,
        and files that are missing, changed or of another export.
        """
        file = path / MANIFEST
        if not is_there(file):
            raise InputError(f"{path} holds no {MANIFEST}; wanted a folder that `fastory export` finished")
        what = f"the {MANIFEST} of an export"
        manifest = read_json(file, what=what, todo=ELSEWHERE)
        check_schema(manifest, file, SCHEMA, ELSEWHERE)
        validated(schema, manifest, file, what=what, todo=ELSEWHERE)
        _check_components(manifest, file)
        if check:
            check_files(path, manifest["files"], trust_cache)
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
        """G: groups of references that the UNet was exported for, those of characters' own appearances among them."""
        return int(self.manifest["groups"])

    @property
    def characters(self) -> int:
        """Groups of characters' own appearances; with them all groups have masks."""
        return int(self.manifest.get("characters", 0))


def check_schema(found: Any, file: Path, known: int, todo: str) -> None:
    """InputError for a JSON file of ours without a schema, or of one that this version does not read."""
    schema = found.get("schema") if isinstance(found, dict) else None
    if type(schema) is not int:
        raise InputError(f"{file} is damaged (no schema); {todo}")
    if schema != known:
        raise InputError(
            f"{file} has schema {schema}; this version of fastory reads schema {known}. Update fastory, or {todo}"
        )


def _check_components(manifest: Mapping[str, Any], file: Path) -> None:
    """InputError for a graph whose hash is not given, or an axis without a range."""
    for name, component in manifest["components"].items():
        for key in ("file", "data"):
            if component[key] not in manifest["files"]:
                raise InputError(
                    f"{file} is damaged (no hash of {component[key]}, the {key} of {name}); {ELSEWHERE}"
                )
        for port in component["inputs"].values():
            axes = [axis.rpartition("*")[2] for axis in port["shape"] if isinstance(axis, str)]
            if unknown := [axis for axis in axes if axis not in component["ranges"]]:
                raise InputError(
                    f"{file} is damaged (no range of {unknown[0]}, an axis of {name}); {ELSEWHERE}"
                )


def check_files(path: Path, listed: Mapping[str, str], trust_cache: bool = False) -> None:
    """InputError for the first file that is not there, leads out of the folder, or is not as it was written."""
    for name, digest in listed.items():
        file = checked_file(path, name, f"{path} is incomplete: {name} is missing; {ANEW}")
        if (file_hash(file) if trust_cache else files.sha256_of(file)) != digest:
            raise InputError(
                f"{file} is not the file of this export (its SHA-256 is not the one in {MANIFEST}): it was changed, damaged, "
                f"or comes from another export; {ANEW}"
            )


def checked_file(folder: Path, name: str, missing: str) -> Path:
    """A regular file inside `folder` that can be read. Raises InputError, with `missing` where there is none."""
    file = folder / name
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{file} is a link that leads out of the folder; {ANEW}")
        if not stat.S_ISREG(file.stat().st_mode):
            raise InputError(f"{file} is a folder, a pipe or a device; wanted a file, {ANEW}")
        with file.open("rb"):
            return file
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(missing) from None
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself is a RuntimeError
        said = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{file} cannot be read ({said}); {ANEW}") from error


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
        rf"\.?({engines}|engines\.json|build_engines\.(json|py)|tensorrt_packages\.py|timing-[^/]+\.cache|fastory\.json)(\.partial)?"
    )


def factored(axis: str) -> tuple[int, str]:
    """`4*references` -> 4, references."""
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z_]+)", axis)
    if match is None:
        raise ValueError(f"axis: wanted a name or factor*name, got {axis!r}")
    return int(match[1] or 1), match[2]


def engine_name(component: str, target: str | None = None) -> str:
    """The file of an engine; target: sm89 and so on for TensorRT for RTX."""
    return f"{component}.engine" if target is None else f"{component}.rtx-{target}.engine"
