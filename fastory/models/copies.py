"""Copies of a model that share its weights: as causal mode draws with it, and with compiled blocks."""

from __future__ import annotations

import copy
from collections.abc import Container
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastory.processors.compiled import channels_last
from fastory.processors.fused import fuse_self_attention
from fastory.processors.projected import CrossAttentionLayers

if TYPE_CHECKING:
    from fastory.models.torch_model import StoryModel


def unet_copy(unet: Any, own: Container[str] = ()) -> Any:
    """A second UNet of the same weights; only the parameters named in `own` are copies, the others are shared."""
    shared: dict[int, Any] = {id(p): p for name, p in unet.named_parameters() if name not in own}
    return copy.deepcopy(unet, memo=shared)


def causal_copy(model: StoryModel) -> StoryModel:
    """The model with causal mode's low-rank updates in its UNet; itself where there are none."""
    updates = model.require_history().updates
    if not updates:
        return model
    made = copy.copy(model)
    made.unet = unet_copy(model.unet, {f"{name}.weight" for name in updates})
    for name, update in updates.items():
        weight = made.unet.get_submodule(name).weight
        weight.data.add_(update.to(weight.device))
    if model.device.type != "cpu":  # their joined weights are those of before
        fuse_self_attention(made.unet, {name.rpartition(".")[0] for name in updates})
    made.layers = CrossAttentionLayers(made.unet)
    return made


def compiled_copy(model: StoryModel) -> StoryModel:
    """The model with compiled blocks; on CUDA its convolutions' weights are copies, laid out as those blocks read them."""
    made = copy.copy(model)
    for other in ("causal", "compiled"):
        made.__dict__.pop(other, None)
    made.placement, made.idle_samplers = replace(model.placement, compiled=True), []
    made.unet = unet_copy(model.unet)
    if model.device.type == "cuda":
        channels_last(made.unet)
    made.layers = CrossAttentionLayers(made.unet, model.layers.key_weights, model.layers.value_weights)
    return made
