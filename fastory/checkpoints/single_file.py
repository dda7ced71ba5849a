"""Opening a single .safetensors checkpoint (original key names) with the configs of a diffusers folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type

from fastory.checkpoints.folder import FAMILIES, Family, Pipeline, check_folder, optional_parts
from fastory.checkpoints.hub import config_folder
from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import tensor_shapes
from fastory.errors import InputError

TEXT_TO_IMAGE = {"v1", "v2", "xl_base"}


def open_single_file(
    path: Path, config: Path | None, dtype: torch.dtype, *, offline: bool
) -> tuple[Pipeline, Family, Path]:
    """The stock pipeline of a single file on the CPU, its family, and the folder its configs came from.

    Without `config` the configs of the published model are asked of the hub. Raises InputError offline, for
    files that hold no text-to-image model, and for configs of the other family.
    """
    model_type = _model_type(path)
    if config is None and offline:
        raise InputError(
            f"{path} holds weights without their configs, and --offline forbids asking the hub. Give a "
            "diffusers folder of the same architecture with --config."
        )
    folder = config or config_folder(model_type, offline=offline)
    family = check_folder(folder)
    _check_same_family(path, folder, family)
    pipeline = _load(path, folder, family, dtype)
    for part in family.parts:
        _check_complete(path, part, getattr(pipeline, part))
    return pipeline, family, folder


def _load(path: Path, folder: Path, family: Family, dtype: torch.dtype) -> Pipeline:
    parts = optional_parts(folder, family, None)
    with loading(f"{path} cannot be opened as {family.title} with the configs of {folder}"):
        # With a local folder as config the hub is never asked.
        open_file = partial(
            family.pipeline.from_single_file, str(path), config=str(folder), local_files_only=True, **parts
        )
        try:
            return open_file(dtype=dtype)
        except NotImplementedError:
            # The cast stumbles over weights that the file lacks; without it they can be named.
            return open_file()


def _model_type(path: Path) -> str:
    shapes = tensor_shapes(path)
    if not any(name.startswith("model.diffusion_model.") for name in shapes):
        raise InputError(
            f"{path} holds no complete checkpoint: wanted tensors named model.diffusion_model.*, came "
            f"{', '.join(sorted(shapes)[:3]) or 'none'}. LoRAs and IP-Adapters have options of their own."
        )
    # The kind is told from names and shapes, so tensors without memory will do.
    model_type = infer_diffusers_model_type(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    )
    if model_type not in TEXT_TO_IMAGE:
        raise InputError(f"{path} is a checkpoint of kind {model_type}; wanted SD1.5 or SDXL text-to-image.")
    return str(model_type)


def _check_same_family(path: Path, folder: Path, family: Family) -> None:
    two_encoders = any(name.startswith("conditioner.embedders.1.") for name in tensor_shapes(path))
    found = FAMILIES["StableDiffusionXLPipeline" if two_encoders else "StableDiffusionPipeline"]
    if found is not family:
        raise InputError(f"{path} is {found.title}; the configs in {folder} are of {family.title}.")


def _check_complete(path: Path, name: str, part: torch.nn.Module) -> None:
    """What the file lacks the loader leaves without memory, which would fail while drawing."""
    missing = [key for key, value in part.state_dict().items() if value.is_meta]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} weights of the {name}, the first is {missing[0]}; the configs are "
            "of another architecture or the file is incomplete."
        )
    part.eval().requires_grad_(False)
