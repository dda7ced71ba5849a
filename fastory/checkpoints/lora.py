"""LoRA files: checked against the model and fused into its weights.

Fused, because every layer then stays a plain linear one: text K and V of all layers come out of one matrix
product, a captured step holds no extra products, and a cached K/V cannot go stale, since weights do not
change afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer

from fastory import packages
from fastory.checkpoints.family import Family, Pipeline
from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import load_finite, said_of
from fastory.errors import InputError

# The first of the two matrices of a layer, in any of the layouts.
DOWN = re.compile(r"(lora_A|[._]down)\.weight$")
OTHER_KINDS = {"dora_scale": "DoRA", "hada_w1": "LoHa", "lokr_w": "LoKr", "ip_adapter.": "IP-Adapter"}
# What trainers let people say of a file in its header: kohya-ss's own keys, and those of Stability's ModelSpec. diffusers and
# PEFT, with which LCM's authors made theirs, write nothing of the kind there.
SAID = (
    *("ss_output_name", "ss_training_comment"),
    *(f"modelspec.{name}" for name in ("title", "description", "usage_hint", "tags")),
)
# `lcm` as a word: lcm-lora-sdv1-5, sdxl_lcm, LCMLoRA, TurboMixLCM; not calcmap.
LCM = re.compile(r"(?<![A-Za-z])lcm(?![a-z])|LCM(?![a-z])|[Ll][Cc][Mm][-_ ]?[Ll][Oo][Rr][Aa]")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that is added `weight` times. name: as it was asked for, a file or a place on the hub."""

    name: str
    path: Path
    weight: float

    @property
    def says_lcm(self) -> bool:
        """Whether the file, its folder, its place on the hub or its header says that it is an LCM-LoRA (arXiv 2311.05556).

        Its tensors do not: other distillations train the same layers, and are drawn otherwise.
        """
        said = said_of(self.path)
        texts = (*Path(self.name).parts[-3:], *(said.get(key, "") for key in SAID))
        return any(LCM.search(text) for text in texts)


def fuse_loras(pipeline: Pipeline, family: Family, loras: Sequence[LoraFile]) -> None:
    """Adds weight * LoRA of every file to the UNet and the text encoders, in the pipeline's own dtype.

    Raises InputError for a file that is no LoRA, was made for other layers, or only partly finds its layers.
    """
    if not loras:
        return
    names = [f"lora_{index}" for index in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        _load(pipeline, family, name, lora.path)
    parts = [part for part in family.parts if _lora_layers(getattr(pipeline, part))]
    with loading("The LoRAs cannot be fused"):
        pipeline.set_adapters(names, [lora.weight for lora in loras])
        pipeline.fuse_lora(components=parts, adapter_names=names)
        pipeline.unload_lora_weights()
    for part in family.parts:
        getattr(pipeline, part).eval().requires_grad_(False)


def _load(pipeline: Pipeline, family: Family, name: str, path: Path) -> None:
    weights = load_finite(path)
    # A pair that is known to fail elsewhere loads LoRAs today; where it does not, the file is not to blame.
    pair = packages.found("text-encoder-lora")
    doubt = (
        f"is it of the other family? or is it the packages: {pair}" if pair else "is it of the other family?"
    )
    with loading(f"LoRA {path} does not fit this {family.title} model ({doubt})"):
        _refuse_other_kinds(path, weights)
        # The pipeline's own conversion knows the layouts that are about: PEFT's, diffusers' older ones,
        # kohya-ss's.
        converted, _ = pipeline.lora_state_dict(dict(weights), unet_config=pipeline.unet.config)
        expected = sum(DOWN.search(key) is not None for key in converted)
        pipeline.load_lora_weights(weights, adapter_name=name)
    found = sum(len(_lora_layers(getattr(pipeline, part), name)) for part in family.parts)
    if expected == 0 or found < expected:
        raise InputError(
            f"LoRA {path} does not fit this {family.title} model: {found} of its {expected} layers are layers of "
            f"the model. It was made for another one; its first tensor is {min(weights, default='none')}."
        )


def _refuse_other_kinds(path: Path, weights: dict[str, torch.Tensor]) -> None:
    for mark, kind in OTHER_KINDS.items():
        if any(mark in key for key in weights):
            raise InputError(f"{path} is of kind {kind}; only LoRA (and LoCon) files can be used.")


def _lora_layers(part: torch.nn.Module, name: str | None = None) -> list[str]:
    """The layers of a part that carry a LoRA, or the LoRA of that name."""
    return [
        key
        for key, module in part.named_modules()
        if isinstance(module, LoraLayer) and (name is None or name in module.lora_A)
    ]
