"""Copies of a model that share its weights: as causal mode draws with it, with compiled blocks, with backends of attention."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastory.processors.attention_backends import Shape, shapes_of, use_backends
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
    made = _copy_placed(model, compiled=True)
    if model.device.type == "cuda":
        channels_last(made.unet)
    return made


def _copy_placed(model: StoryModel, **changed: Any) -> StoryModel:
    """A model over the same weights whose placement says something else, with a UNet of its own and what belongs to it."""
    made = copy.copy(model)
    for other in ("causal", "compiled"):
        made.__dict__.pop(other, None)
    made.placement, made.idle_samplers, made.attending = replace(model.placement, **changed), [], {}
    made.unet = unet_copy(model.unet)
    made.layers = CrossAttentionLayers(made.unet, model.layers.key_weights, model.layers.value_weights)
    return made


def self_attention_shapes(model: Any, width: int, height: int) -> list[Shape]:
    """The shapes of a model's self-attention in pictures of this size, in pixels, each once."""
    factor = model.vae_factor
    return sorted(set(shapes_of(model.unet, width // factor, height // factor).values()), reverse=True)


def attending_copy(model: Any, chosen: Mapping[str, str], width: int, height: int) -> Any:
    """The model with self-attention by these backends, by shape, in pictures of this size, in pixels: the same each time."""
    attention, factor = tuple(sorted(chosen.items())), model.vae_factor
    key = attention, width, height
    if key not in model.attending:
        made = _copy_placed(model, attention=attention)
        use_backends(made.unet, chosen, width // factor, height // factor)
        model.attending[key] = made
    return model.attending[key]
