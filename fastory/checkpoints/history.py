"""Opening the history encoder of causal mode: a model's `history` folder, and adapters made by `fastory tune`.

history/config.json          HistoryConfig
history/model.safetensors    the weights of HistoryEncoder
history/tokenizer            its own tokenizer; without one the model's is used

An adapter is one safetensors file: `history.*` are weights of the encoder, over the folder's; `unet.<module>.lora_A` and
`.lora_B` are low-rank updates of the UNet's attention, B A added to the module's weight, in causal mode alone. Its
metadata holds `history`, the HistoryConfig as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import BlipImageProcessorPil

from fastory import documents
from fastory.checkpoints.configs import check_files, check_sizes, open_tokenizer
from fastory.checkpoints.history_encoder import HistoryConfig, HistoryEncoder
from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import load_finite, read_json, tensor_shapes
from fastory.errors import InputError

ENC = "[ENC]"  # what BLIP puts in place of the first token of a caption that goes with a picture


@dataclass(frozen=True)
class History:
    """A history encoder with what prepares its inputs, on the CPU, in eval mode, without gradients.

    updates: (module of the UNet, matrix to add to its weight) of causal mode. sources: the weight files read.
    """

    encoder: HistoryEncoder
    tokenizer: Any
    image_processor: BlipImageProcessorPil
    updates: Mapping[str, Tensor]
    sources: tuple[Path, ...]


def open_history(
    folder: Path | None,
    adapter: Path | None,
    tokenizer: Any,
    unet: torch.nn.Module,
    text_width: int,
    dtype: torch.dtype,
) -> History | None:
    """The history encoder of a model folder, with an adapter over it; None where neither is there.

    tokenizer: the model's own, for a history without one. text_width: C_x of the UNet. Raises InputError for what is
    incomplete, of other sizes, or does not belong to this UNet.
    """
    inside = folder / "history" if folder is not None and (folder / "history").is_dir() else None
    if inside is None and adapter is None:
        return None
    tensors: dict[str, Tensor] = {}
    sources: list[Path] = []
    config: HistoryConfig | None = None
    if inside is not None:
        check_files(inside)
        config = HistoryConfig.read(read_json(inside / "config.json"), str(inside / "config.json"))
        tensors |= load_finite(inside / "model.safetensors")
        sources.append(inside / "model.safetensors")
        if (inside / "tokenizer").is_dir():
            tokenizer = open_tokenizer(inside / "tokenizer")
    updates: dict[str, Tensor] = {}
    if adapter is not None:
        config = read_adapter_config(adapter)
        loaded = load_finite(adapter)
        sources.append(adapter)
        tensors |= {k.removeprefix("history."): v for k, v in loaded.items() if k.startswith("history.")}
        updates = low_rank_updates(loaded, unet, adapter)
    assert config is not None
    where = str(sources[-1])
    check_sizes(
        config.as_dict(), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, sources[-1]
    )
    if config.width != text_width:
        raise InputError(
            f"{where} makes history tokens of width {config.width}, and the UNet takes {text_width}; "
            "it was trained for another model"
        )
    return History(
        _build(config, tensors, where).to(dtype),
        tokenizer,
        image_processor(config),
        {name: update.to(dtype) for name, update in updates.items()},
        tuple(sources),
    )


def read_adapter_config(path: Path) -> HistoryConfig:
    """The HistoryConfig of an adapter file; reads no tensor. Raises InputError for another kind of file."""
    tensor_shapes(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "history" not in metadata:
        raise InputError(
            f"{path} is not an adapter of causal mode: its metadata has no `history`; wanted a file that `fastory tune` wrote"
        )
    what, todo = "the sizes of a history encoder in its metadata", "take the file anew from its source"
    values = documents.parse_json(metadata["history"].encode(), path, what=what, todo=todo)
    if not isinstance(values, dict):
        raise InputError(f"{path}: the metadata `history`: wanted an object, got {str(values)[:60]}")
    return HistoryConfig.read(values, str(path))


def image_processor(config: HistoryConfig) -> BlipImageProcessorPil:
    """Pictures as BLIP takes them: squashed to its square, CLIP's normalisation."""
    side = config.vision["image_size"]
    return BlipImageProcessorPil(size={"height": side, "width": side})


def _build(config: HistoryConfig, tensors: Mapping[str, Tensor], where: str) -> HistoryEncoder:
    with loading(f"{where}: its sizes are not those of the Blip classes"), torch.device("meta"):
        encoder = HistoryEncoder(config)  # without memory: what sizes ask for is compared first
    wanted = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing = sorted(wanted.keys() - got.keys())
    unknown = sorted(got.keys() - wanted.keys())
    other = sorted(name for name in wanted.keys() & got.keys() if wanted[name] != got[name])
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", other)):
        if names:
            raise InputError(
                f"{where}: {len(names)} weights of the history encoder are {what}, the first is {names[0]}; "
                "the file is incomplete or of another model"
            )
    with loading(f"{where} cannot be opened"):
        encoder = HistoryEncoder(config)
        encoder.load_state_dict(dict(tensors))
    return encoder.eval().requires_grad_(False)


def low_rank_updates(tensors: Mapping[str, Tensor], unet: torch.nn.Module, path: Path) -> dict[str, Tensor]:
    """B A of every low-rank update, by the name of its module in the UNet. Raises InputError for one that does not fit."""
    modules = dict(unet.named_modules())
    updates: dict[str, Tensor] = {}
    for key, down in tensors.items():
        if not key.startswith("unet.") or not key.endswith(".lora_A"):
            continue
        name = key.removeprefix("unet.").removesuffix(".lora_A")
        up, module = tensors.get(f"unet.{name}.lora_B"), modules.get(name)
        if up is None or not isinstance(module, torch.nn.Linear):
            raise InputError(f"{path}: the low-rank update {name} does not belong to this UNet")
        if (up.shape[0], down.shape[1]) != module.weight.shape or up.shape[1] != down.shape[0]:
            raise InputError(
                f"{path}: the low-rank update {name} is {up.shape[0]} x {down.shape[1]}, "
                f"and the UNet's weight {module.weight.shape[0]} x {module.weight.shape[1]}"
            )
        updates[name] = up.float() @ down.float()
    return updates
