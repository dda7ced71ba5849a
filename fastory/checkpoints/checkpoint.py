"""Opening a model with what comes beside it: adapter, image encoder, LoRAs, and the folder's own defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from fastory.checkpoints.family import Family, Pipeline
from fastory.checkpoints.folder import open_folder
from fastory.checkpoints.hashes import tensors_hash
from fastory.checkpoints.history import History, open_history, read_adapter_config
from fastory.checkpoints.hub import encoder_path, model_path, require_parts, weight_path
from fastory.checkpoints.image_encoder import find_image_encoder, image_processor, load_image_encoder
from fastory.checkpoints.ip_adapter import (
    AdapterHeader,
    IPAdapter,
    check_text_width,
    load_adapter,
    read_adapter_header,
)
from fastory.checkpoints.loading import enough_memory
from fastory.checkpoints.lora import LoraFile, fuse_loras
from fastory.checkpoints.single_file import open_single_file
from fastory.checkpoints.weights import is_inside, is_there, read_json, tensor_shapes
from fastory.errors import InputError
from fastory.model_names import local_path, published

DEFAULTS_FILE = "fastory_defaults.json"
DEFAULTS_SCHEMA = 1


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a model, on the CPU, in eval mode, without gradients.

    The pipeline is the stock one without an IP-Adapter and without image encoder: its UNet is plain, LoRAs
    are fused into its weights. `sources` are the weight files read, for model_hashes, `loras` those of LoRAs among them;
    `weights` the tensors of each part of a pipeline that was loaded elsewhere, whose files nobody knows (checkpoint_of; on its
    device); `distilled` what the user says that they were distilled as, of settings.DISTILLED.
    """

    pipeline: Pipeline
    family: Family
    image_encoder: CLIPVisionModelWithProjection | None
    image_processor: CLIPImageProcessorPil
    adapter: IPAdapter | None
    history: History | None
    defaults: Mapping[str, object]
    sources: tuple[Path, ...]
    weights: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    loras: tuple[LoraFile, ...] = ()
    distilled: str = "auto"

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of the tensors of `weights`, by part, and the weight of each LoRA."""
        loras = {
            f"lora {n}: {Path(lora.name).name}": f"weight {lora.weight:g}"
            for n, lora in enumerate(self.loras)
        }
        return {part: tensors_hash(tensors) for part, tensors in self.weights.items()} | loras


def open_checkpoint(
    model: str | Path,
    *,
    config: str | Path | None = None,
    ip_adapter: str | Path | None = None,
    image_encoder: str | Path | None = None,
    adapter: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    distilled: str = "auto",
    dtype: torch.dtype = torch.float32,
    offline: bool = False,
) -> Checkpoint:
    """Opens `model`: "builtin", a diffusers folder, a .safetensors file (with `config`, a diffusers folder), a hub id, or a
    name of model_names.PUBLISHED, which brings an IP-Adapter and its image encoder.

    `ip_adapter` and each LoRA are a .safetensors file or `owner/name/path` of the hub, `image_encoder` a folder or
    `owner/name/folder`; `adapter` is a .safetensors file that `fastory tune` wrote. A folder's own ones (the keys ip_adapter
    and adapter of its fastory_defaults.json) are used when none is given. What is small is looked at before what is large is
    read. Raises InputError for whatever cannot be used.
    """
    with enough_memory(f"the model {model}"):
        config = None if config is None else _config_folder(config)
        model, ip_adapter, image_encoder = _named_parts(model, ip_adapter, image_encoder, offline)
        path = builtin_folder() if model == "builtin" else model_path(model, offline=offline)
        configs = path if path.is_dir() else config
        defaults = read_defaults(path) if path.is_dir() else {}
        ip_adapter_file = _named_file(path, defaults, "ip_adapter", ip_adapter, "IP-Adapter", offline)
        header = read_adapter_header(ip_adapter_file) if ip_adapter_file else None
        causal_file = _named_file(path, defaults, "adapter", adapter, "Adapter", offline)
        if causal_file:
            read_adapter_config(causal_file)
        lora_files = _lora_files(loras, offline)
        encoder_folder = _encoder_folder(image_encoder, configs, header, offline)

        pipeline, family, sources = _open_model(path, config, dtype, offline)
        fuse_loras(pipeline, family, lora_files)
        references = load_adapter(header, pipeline.unet, dtype) if header else None
        text_width = int(pipeline.unet.config.cross_attention_dim)
        parts = (pipeline.tokenizer, pipeline.unet, text_width, dtype)
        history = open_history(path if path.is_dir() else None, causal_file, *parts)
        encoder, encoder_sources = load_image_encoder(encoder_folder, dtype) if encoder_folder else (None, ())
    return Checkpoint(
        pipeline=pipeline,
        family=family,
        image_encoder=encoder,
        image_processor=image_processor(pipeline.feature_extractor, encoder),
        adapter=references,
        history=history,
        defaults=defaults,
        sources=(
            *(*sources, *((header.path,) if header else ())),
            *encoder_sources,
            *(lora.path for lora in lora_files),
            *(history.sources if history else ()),
        ),
        loras=lora_files,
        distilled=distilled,
    )


def _named_parts(
    model: str | Path, ip_adapter: str | Path | None, image_encoder: str | Path | None, offline: bool
) -> tuple[str | Path, str | Path | None, str | Path | None]:
    """What a name of PUBLISHED stands for, downloaded, under what is asked for beside it; other models as they are."""
    row = published(model)
    if row is None:
        return model, ip_adapter, image_encoder
    if ip_adapter is None:
        ip_adapter, image_encoder = row.ip_adapter, image_encoder or row.image_encoder
    require_parts(str(model), row.model, ip_adapter, image_encoder, offline=offline)
    return row.model, ip_adapter, image_encoder


def _config_folder(config: str | Path) -> Path:
    folder = local_path(config, "--config")
    if folder is None or not folder.is_dir():
        raise InputError(
            f"--config {config} is not a folder; wanted a diffusers folder of the same architecture."
        )
    return folder


def builtin_folder() -> Path:
    """The built-in model's diffusers folder."""
    return Path(str(files("fastory.builtin") / "weights"))


def read_defaults(folder: Path) -> Mapping[str, object]:
    """The settings a model folder asks for (fastory_defaults.json), or {} where it has none.

    Raises InputError for a file that is not JSON, lacks its schema, or has a newer one than this version
    reads.
    """
    path = folder / DEFAULTS_FILE
    if not is_there(path):
        return {}
    defaults = read_json(path)
    schema = defaults.get("schema")
    if type(schema) is not int or schema < 1:
        raise InputError(f'{path}: wanted "schema": {DEFAULTS_SCHEMA}, came {str(schema)[:60]!r}.')
    if schema > DEFAULTS_SCHEMA:
        raise InputError(
            f"{path} has schema {schema}; this version of fastory reads schema {DEFAULTS_SCHEMA}. "
            "Update fastory."
        )
    world_of(defaults, f"{path}: ")
    return defaults


def world_of(defaults: Mapping[str, object], where: str = "") -> str | None:
    """The drawn world, `builtin` or None, that a folder's defaults name: its model knows the words of that one alone.

    where: the beginning of the message. Raises InputError for another name.
    """
    world = defaults.get("world")
    if world not in (None, "builtin"):
        raise InputError(f"{where}world is {str(world)[:60]!r}; wanted builtin, or no such key.")
    return "builtin" if world else None


def _named_file(
    model: Path,
    defaults: Mapping[str, object],
    key: str,
    requested: str | Path | None,
    what: str,
    offline: bool,
) -> Path | None:
    """A weight file: the given one, else the one that the model's folder names under `key`."""
    if requested is not None:
        return weight_path(requested, what=what, offline=offline)
    named = defaults.get(key)
    if named is None:
        return None
    # The name comes with the folder, perhaps from a stranger: it may not lead out of it.
    if not is_inside(named):
        raise InputError(
            f"{model / DEFAULTS_FILE}: {key} is {str(named)[:60]!r}; wanted a file inside the folder."
        )
    assert isinstance(named, str)
    return model / named


def _lora_files(loras: Sequence[tuple[str | Path, float]], offline: bool) -> tuple[LoraFile, ...]:
    for name, weight in loras:
        if not math.isfinite(weight):
            raise InputError(f"LoRA {name}: wanted a finite weight, got {weight}")
    located = tuple(
        LoraFile(str(name), weight_path(name, what="LoRA", offline=offline), weight) for name, weight in loras
    )
    for lora in located:
        tensor_shapes(lora.path)
    return located


def _encoder_folder(
    requested: str | Path | None, configs: Path | None, header: AdapterHeader | None, offline: bool
) -> Path | None:
    if header:
        # Before the encoder is looked for: an adapter of the other family wants another encoder too.
        check_text_width(header, _text_width(configs))
    folder = encoder_path(requested, offline=offline) if requested is not None else None
    return find_image_encoder(folder, configs, header)


def _text_width(folder: Path | None) -> object:
    """The UNet's cross_attention_dim by the folder's configs; None where they are not at hand yet."""
    config = folder / "unet" / "config.json" if folder else None
    return read_json(config).get("cross_attention_dim") if config and is_there(config) else None


def _open_model(
    path: Path, config: Path | None, dtype: torch.dtype, offline: bool
) -> tuple[Pipeline, Family, tuple[Path, ...]]:
    if path.is_dir():
        if config is not None:
            raise InputError(
                f"--config is for single .safetensors files; {path} is a folder with its own configs."
            )
        return open_folder(path, dtype)
    pipeline, family = open_single_file(path, config, dtype, offline=offline)
    return pipeline, family, (path,)
