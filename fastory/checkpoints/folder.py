"""Opening a diffusers folder: each part loaded with its keys checked, together the stock pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from fastory.checkpoints.configs import (
    check_part,
    check_tokenizer,
    check_unet,
    check_vae,
    open_processor,
    open_scheduler,
    open_tokenizer,
)
from fastory.checkpoints.family import PIPELINES, Family, Pipeline
from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import component_weights, is_there, read_json, tensor_shapes
from fastory.errors import InputError


def open_folder(folder: Path, dtype: torch.dtype) -> tuple[Pipeline, Family, tuple[Path, ...]]:
    """The stock pipeline of a diffusers folder on the CPU, its family and the weight files read.

    The image encoder is not loaded here. Raises InputError for a folder that is not of the two families, is
    incomplete, holds pickles, or whose files do not hold exactly the weights its configs ask for.
    """
    family = check_folder(folder)
    classes = dict(family.parts)
    if _has(folder, "safety_checker"):
        classes["safety_checker"] = StableDiffusionSafetyChecker
    others = small_parts(folder, family)
    parts: dict[str, Any] = {}
    files: list[Path] = []
    for name, model_class in classes.items():
        parts[name], read = load_part(model_class, folder / name, dtype)
        files += read
    parts |= others | optional_parts(folder, family, parts.get("safety_checker"))
    with loading(f"{folder} cannot be opened as {family.title}"):
        pipeline = family.pipeline(**parts)
        pipeline.register_to_config(_name_or_path=str(folder))
    check_parts_fit(pipeline, family, folder)
    return pipeline, family, tuple(files)


def small_parts(folder: Path, family: Family) -> dict[str, Any]:
    """Tokenizers and scheduler, of the classes that we know: an index may name any class of the libraries."""
    index = read_json(folder / "model_index.json")
    parts: dict[str, Any] = {}
    for name in family.others:
        if name != "scheduler":
            parts[name] = open_tokenizer(folder / name, CLIPTokenizer)
    named = index.get("scheduler")
    class_name = named[1] if isinstance(named, list) and len(named) == 2 else None
    return {**parts, "scheduler": open_scheduler(folder / "scheduler", class_name)}


def check_parts_fit(pipeline: Pipeline, family: Family, folder: Path) -> None:
    """InputError for parts that are whole, but of different models: their sizes do not meet."""
    unet, vae = pipeline.unet.config, pipeline.vae.config
    if unet.in_channels != vae.latent_channels:
        raise InputError(
            f"{folder}: the UNet draws {unet.in_channels} channels, and the VAE decodes {vae.latent_channels}; "
            "they are of different models"
        )
    width = 0
    for number in ("", "_2")[: len([name for name in family.others if name.startswith("tokenizer")])]:
        text = getattr(pipeline, f"text_encoder{number}").config
        width += text.hidden_size
        tokenizer = getattr(pipeline, f"tokenizer{number}")
        check_tokenizer(
            tokenizer, folder / f"tokenizer{number}", text.vocab_size, text.max_position_embeddings
        )
    if width != unet.cross_attention_dim:
        raise InputError(
            f"{folder}: the UNet reads texts of width {unet.cross_attention_dim}, and the text encoders make {width}; "
            "they are of different models"
        )


def check_folder(folder: Path) -> Family:
    """The family of a diffusers folder by its model_index.json and UNet config; reads no weights.

    Raises InputError for any other pipeline, a missing part, and UNets that take more than latents and text.
    """
    if not is_there(folder / "model_index.json"):
        raise InputError(
            f"{folder} is not a diffusers model folder: it has no model_index.json. Give a folder as "
            "save_pretrained writes it, or a single .safetensors file with --config."
        )
    found = read_json(folder / "model_index.json").get("_class_name")
    if not isinstance(found, str) or found not in PIPELINES:
        raise InputError(f"{folder} is a {str(found)[:60]} model; wanted one of {', '.join(PIPELINES)}.")
    family = PIPELINES[found]
    for part in (*family.parts, *family.others):
        if not (folder / part).is_dir():
            raise InputError(f"{folder} has no {part} folder, and {family.title} needs one.")
    _check_unet_config(folder, family)
    return family


def _check_unet_config(folder: Path, family: Family) -> None:
    path = folder / "unet" / "config.json"
    config = read_json(path)
    channels = str(config.get("in_channels", 4))[:60]
    if channels != str(config.get("out_channels", 4))[:60]:
        known = {"9": "an inpainting model", "8": "a picture-editing model (InstructPix2Pix)"}
        raise InputError(
            f"{folder}: the UNet takes {channels} channels ({known.get(channels, 'another kind of model')}); "
            "wanted a text-to-image UNet with as many channels in as out."
        )
    wanted = family.addition_embed_type
    if config.get("addition_embed_type") != wanted or config.get("encoder_hid_dim_type") is not None:
        raise InputError(
            f"{folder}: the UNet's conditioning (addition_embed_type {str(config.get('addition_embed_type'))[:60]}, "
            f"encoder_hid_dim_type {str(config.get('encoder_hid_dim_type'))[:60]}) is not that of "
            f"{family.title} ({wanted}, None)."
        )
    check_unet(config, path)
    check_vae(read_json(folder / "vae" / "config.json"), folder / "vae" / "config.json")


def load_part(model_class: Any, folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[Path, ...]]:
    """One part in eval mode without gradients, and its weight files, which must hold every weight.

    The libraries fill a missing weight with random numbers and a warning, which shows only as spoilt
    pictures.
    """
    variant, files = component_weights(folder)
    check_part(folder, {name: shape for file in files for name, shape in tensor_shapes(file).items()})
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
    options = {
        "safety_checker": safety_checker,
        "requires_safety_checker": safety_checker is not None,
        "force_zeros_for_empty_prompt": read_json(folder / "model_index.json").get(
            "force_zeros_for_empty_prompt"
        ),
    }
    if not isinstance(options["force_zeros_for_empty_prompt"], bool):
        del options["force_zeros_for_empty_prompt"]  # the pipeline has a default
    return parts | {name: options[name] for name in family.pipeline_options if name in options}


def feature_extractor(folder: Path) -> CLIPImageProcessorPil | None:
    """The folder's CLIP preparation, by Pillow whatever class the index names: torchvision changes pixels."""
    if not is_there(folder / "feature_extractor" / "preprocessor_config.json"):
        return None
    return open_processor(folder / "feature_extractor", CLIPImageProcessorPil)


def _has(folder: Path, part: str) -> bool:
    entry = read_json(folder / "model_index.json").get(part)
    return isinstance(entry, list) and len(entry) > 0 and entry[0] is not None
