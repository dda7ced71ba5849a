"""Opening a single .safetensors checkpoint (original key names) with the configs of a diffusers folder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type

from fastory.checkpoints.configs import check_part
from fastory.checkpoints.family import Family, Pipeline, family_of_encoders
from fastory.checkpoints.folder import check_folder, check_parts_fit, optional_parts, small_parts
from fastory.checkpoints.hub import config_folder
from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import tensor_shapes
from fastory.errors import InputError

TEXT_TO_IMAGE = {"v1", "v2", "xl_base"}


def open_single_file(
    path: Path, config: Path | None, dtype: torch.dtype, *, offline: bool
) -> tuple[Pipeline, Family]:
    """The stock pipeline of a single file on the CPU, and its family.

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
    for part in family.parts:
        check_part(folder / part, tensor_shapes(path))
    pipeline = _load(path, folder, family, dtype)
    for part in family.parts:
        module = getattr(pipeline, part)
        if any(weight.is_meta for weight in module.state_dict().values()):
            raise _incomplete(path, folder)
        module.eval().requires_grad_(False)
    check_parts_fit(pipeline, family, folder)
    return pipeline, family


def _load(path: Path, folder: Path, family: Family, dtype: torch.dtype) -> Pipeline:
    parts = small_parts(folder, family) | optional_parts(folder, family, None)
    with loading(f"{path} cannot be opened as {family.title} with the configs of {folder}"):
        try:
            # With a local folder as config the hub is never asked.
            return family.pipeline.from_single_file(
                str(path), config=str(folder), dtype=dtype, local_files_only=True, **parts
            )
        except NotImplementedError as error:
            # A weight that the file lacks is left without memory, and placing the model stumbles over it.
            raise _incomplete(path, folder) from error


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
    found = family_of_encoders(2 if two_encoders else 1)
    if found is not family:
        raise InputError(f"{path} is {found.title}; the configs in {folder} are of {family.title}.")


def _incomplete(path: Path, folder: Path) -> InputError:
    return InputError(
        f"{path} lacks weights that the configs in {folder} ask for: it is incomplete, or they are of "
        "another architecture."
    )
