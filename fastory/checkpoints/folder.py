"""Opening a diffusers folder: each part loaded with its keys checked, together the stock pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTextModelWithProjection

from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import component_weights, read_json, tensor_shapes
from fastory.errors import InputError

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline


@dataclass(frozen=True)
class Family:
    """One of the two kinds of model: its stock pipeline, the parts with weights, and the parts without."""

    name: Literal["sd15", "sdxl"]
    title: str
    pipeline: type[Pipeline]
    parts: dict[str, Any]
    others: tuple[str, ...]


FAMILIES = {
    "StableDiffusionPipeline": Family(
        "sd15",
        "Stable Diffusion 1.5",
        StableDiffusionPipeline,
        {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel},
        ("tokenizer", "scheduler"),
    ),
    "StableDiffusionXLPipeline": Family(
        "sdxl",
        "SDXL",
        StableDiffusionXLPipeline,
        {
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
        },
        ("tokenizer", "tokenizer_2", "scheduler"),
    ),
}


def open_folder(folder: Path, dtype: torch.dtype) -> tuple[Pipeline, Family, tuple[Path, ...]]:
    """The stock pipeline of a diffusers folder on the CPU, its family and the weight files read.

    The image encoder is not loaded here. Raises InputError for a folder that is not of the two families, is
    incomplete, holds pickles, or whose files do not hold exactly the weights its configs ask for.
    """
    family = check_folder(folder)
    classes = dict(family.parts)
    if _has(folder, "safety_checker"):
        classes["safety_checker"] = StableDiffusionSafetyChecker
    parts: dict[str, Any] = {}
    files: list[Path] = []
    for name, model_class in classes.items():
        parts[name], read = load_part(model_class, folder / name, dtype)
        files += read
    parts |= optional_parts(folder, family, parts.get("safety_checker"))
    with loading(f"{folder} cannot be opened as {family.title}"):
        pipeline = family.pipeline.from_pretrained(folder, local_files_only=True, **parts)
    return pipeline, family, tuple(files)


def check_folder(folder: Path) -> Family:
    """The family of a diffusers folder by its model_index.json and UNet config; reads no weights.

    Raises InputError for any other pipeline, a missing part, and UNets that take more than latents and text.
    """
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder} is not a diffusers model folder: it has no model_index.json. Give a folder as "
            "save_pretrained writes it, or a single .safetensors file with --config."
        )
    found = read_json(folder / "model_index.json").get("_class_name")
    if found not in FAMILIES:
        raise InputError(f"{folder} is a {found} model; wanted one of {', '.join(FAMILIES)}.")
    family = FAMILIES[str(found)]
    for part in (*family.parts, *family.others):
        if not (folder / part).is_dir():
            raise InputError(f"{folder} has no {part} folder, and {family.title} needs one.")
    _check_unet_config(folder, family)
    return family


def _check_unet_config(folder: Path, family: Family) -> None:
    config = read_json(folder / "unet" / "config.json")
    channels = str(config.get("in_channels", 4))
    if channels != str(config.get("out_channels", 4)):
        known = {"9": "an inpainting model", "8": "a picture-editing model (InstructPix2Pix)"}
        raise InputError(
            f"{folder}: the UNet takes {channels} channels ({known.get(channels, 'another kind of model')}); "
            "wanted a text-to-image UNet with as many channels in as out."
        )
    wanted = "text_time" if family.name == "sdxl" else None
    if config.get("addition_embed_type") != wanted or config.get("encoder_hid_dim_type") is not None:
        raise InputError(
            f"{folder}: the UNet's conditioning (addition_embed_type {config.get('addition_embed_type')}, "
            f"encoder_hid_dim_type {config.get('encoder_hid_dim_type')}) is not that of "
            f"{family.title} ({wanted}, None)."
        )


def load_part(model_class: Any, folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[Path, ...]]:
    """One part in eval mode without gradients, and its weight files, which must hold every weight.

    The libraries fill a missing weight with random numbers and a warning, which shows only as spoilt
    pictures.
    """
    read_json(folder / "config.json")
    variant, files = component_weights(folder)
    for file in files:
        tensor_shapes(file)
    with loading(f"{folder} cannot be opened as {model_class.__name__}"):
        part, found = model_class.from_pretrained(
            folder,
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = sorted(str(key) for key in (*found["missing_keys"], *found["mismatched_keys"]))
    if missing:
        raise InputError(
            f"{folder} does not fit its config.json: {len(missing)} weights are missing or of another shape, "
            f"the first is {missing[0]}. The files are of another model or incomplete."
        )
    return part.requires_grad_(False), files


def optional_parts(folder: Path, family: Family, safety_checker: torch.nn.Module | None) -> dict[str, Any]:
    """Optional arguments of the stock pipeline. The image encoder stays out: a Checkpoint holds it."""
    parts: dict[str, Any] = {"feature_extractor": feature_extractor(folder), "image_encoder": None}
    if family.name == "sd15":
        parts |= {
            "safety_checker": safety_checker,
            "requires_safety_checker": safety_checker is not None,
        }
    return parts


def feature_extractor(folder: Path) -> CLIPImageProcessorPil | None:
    """The folder's CLIP preparation, by Pillow whatever class the index names: torchvision changes pixels."""
    if not (folder / "feature_extractor" / "preprocessor_config.json").is_file():
        return None
    with loading(f"{folder / 'feature_extractor'} cannot be opened"):
        return CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor", local_files_only=True)


def _has(folder: Path, part: str) -> bool:
    entry = read_json(folder / "model_index.json").get(part)
    return isinstance(entry, list) and entry[0] is not None
