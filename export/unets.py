"""The UNets of both modes as components: latents and contexts, K and V only, to a prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastory.conditioning.history import HistoryContext, LayerHistory
from fastory.conditioning.references import LayerReferences, ReferenceContext
from fastory.conditioning.regions import LEVELS, Grid
from fastory.export.choices import SIDES, Groups
from fastory.export.component import (
    BEHIND_ALL,
    RANGES,
    Axis,
    Component,
    Input,
    random_bias,
    random_mask,
    random_padding,
    random_shares,
    some_padding,
)
from fastory.kernels.banded import banded_causal_attention
from fastory.models.engine_inputs import HISTORY_BIAS, MASK, SELF_BIAS, TEXT_BIAS, level_name
from fastory.models.torch_model import StoryModel
from fastory.processors.attention_backends import level_of
from fastory.processors.consistent import self_attention_levels
from fastory.processors.projected import Layer, attend_biased


class _Unet(nn.Module):
    """The UNet with references; masks and biases, and SDXL's and LCM's further inputs, by name."""

    def __init__(
        self, unet: nn.Module, tokens_per_ref: int, placed: tuple[str, ...], added: tuple[str, ...]
    ) -> None:
        """placed: the inputs by which characters keep to their part of the picture, which come before those `added`."""
        super().__init__()
        self.unet, self.tokens_per_ref, self.placed, self.added = unet, tokens_per_ref, placed, added

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        text_kv: Tensor,
        ref_kv: Tensor,
        ref_visible: Tensor,
        ref_offsets: Tensor,
        scale: Tensor,
        *further: Tensor,
    ) -> Tensor:
        """The inputs of ReferenceContext beside latents and timestep -> prediction (B, c, h, w)."""
        own = (text_kv, ref_kv, scale, ref_visible, ref_offsets, self.tokens_per_ref)
        levels, added = _by_name(self.placed, self.added, further)
        context = _Placed(*own, unet=self.unet, levels=levels) if levels else ReferenceContext(*own)
        return call_unet(self.unet, sample, timestep, context, added)


def _by_name(
    placed: tuple[str, ...], added: tuple[str, ...], further: tuple[Tensor, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs behind those that every UNet has: of characters' places, and SDXL's and LCM's."""
    count = len(placed)
    return dict(zip(placed, further[:count], strict=True)), dict(zip(added, further[count:], strict=True))


@dataclass(frozen=True)
class _Placed(ReferenceContext):
    """In a graph, where a layer's number of query tokens is not known: masks and biases by the names of a level's inputs."""

    unet: Any = None
    levels: Mapping[str, Tensor] = field(default_factory=dict)

    def of_layer(self, layer: Layer, queries: int) -> LayerReferences:
        """With the mask and the text's bias of the layer's level."""
        level = level_of(self.unet, layer.name)
        bias = self.levels.get(level_name(TEXT_BIAS, level))
        return replace(
            super().of_layer(layer, queries),
            mask=self.levels[level_name(MASK, level)].flatten(2),
            text_bias=None if bias is None else bias.flatten(1, 2),
        )

    def self_attention(self, tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """With the bias of the level that has as many tokens."""
        return _bounded(self.levels, tokens)


def _bounded(levels: Mapping[str, Tensor], tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Self-attention with the bias of the level that has as many tokens; None where none has."""
    for level in LEVELS:
        bias = levels.get(level_name(SELF_BIAS, level))
        if bias is not None and tokens == bias.shape[1] * bias.shape[2]:
            return partial(attend_biased, bias=bias.flatten(3).flatten(1, 2))
    return None


class _CausalUnet(nn.Module):
    """The UNet of causal mode: K and V of the caption and the window, which of them are padding, and biases by name."""

    def __init__(self, unet: nn.Module, placed: tuple[str, ...], added: tuple[str, ...]) -> None:
        """placed, added: as of _Unet."""
        super().__init__()
        self.unet, self.placed, self.added = unet, placed, added

    def forward(
        self, sample: Tensor, timestep: Tensor, kv: Tensor, padding: Tensor, *further: Tensor
    ) -> Tensor:
        """kv (B, n, W), padding (B, n) -> prediction (B, c, h, w)."""
        own = (kv, padding, 0, 1)
        levels, added = _by_name(self.placed, self.added, further)
        context = _PlacedPast(*own, unet=self.unet, levels=levels) if levels else _AllPast(*own)
        return call_unet(self.unet, sample, timestep, context, added)


@dataclass(frozen=True)
class _PlacedPast(HistoryContext):
    """In a graph: biases by the names of a level's inputs, as of _Placed."""

    unet: Any = None
    levels: Mapping[str, Tensor] = field(default_factory=dict)

    def of_layer(self, layer: Layer, queries: int) -> LayerHistory:
        """With the bias of the layer's level; all that is not padding is seen."""
        bias = self.levels[level_name(HISTORY_BIAS, level_of(self.unet, layer.name))].flatten(1, 2)
        return replace(super().of_layer(layer, queries), bias=bias)

    def self_attention(self, tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """With the bias of the level that has as many tokens."""
        return _bounded(self.levels, tokens)


class _AllPast(HistoryContext):
    """A window of any length in a graph, where a band's sizes are constants: all that is not padding is seen."""

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        keys, values = layer.keys_values(self.kv)
        return banded_causal_attention(
            query,
            keys,
            values,
            group_size=1,
            window=0,
            query_group=BEHIND_ALL,
            query_group_size=0,
            key_padding=self.padding,
        )


def call_unet(
    unet: Any, sample: Tensor, timestep: Tensor, context: Any, added: Mapping[str, Tensor]
) -> Tensor:
    """One UNet call as the sampler makes it."""
    further = dict(added)
    timestep_cond = further.pop("timestep_cond", None)
    output: Tensor = unet(
        sample,
        timestep,
        encoder_hidden_states=None,
        timestep_cond=timestep_cond,
        added_cond_kwargs=further or None,
        cross_attention_kwargs={"context": context},
        return_dict=False,
    )[0]
    return output


def _latents(model: StoryModel) -> tuple[dict[str, Input], dict[str, tuple[int, int]], tuple[Axis, ...]]:
    """Inputs sample and timestep, the ranges of their sizes, and the shape of the prediction."""
    factor = model.size_factor // model.vae_factor
    channels = int(model.unet.config.in_channels)
    shape: tuple[Axis, ...] = ("batch", channels, f"{factor}*height", f"{factor}*width")
    inputs = {
        "sample": Input(shape, model.dtype),
        # 500 in every type; a step is a whole number that half types hold up to 2048, bfloat16 up to 256.
        "timestep": Input((), torch.float32, lambda generator, size: torch.tensor(500.0)),
    }
    out = ("batch", int(model.unet.config.out_channels), *shape[2:])
    return inputs, {"batch": RANGES["batch"], "height": (1, 64), "width": (1, 64)}, out


def _added(model: StoryModel) -> dict[str, Input]:
    """SDXL's and LCM's further inputs."""
    added: dict[str, Input] = {}
    width = model.family.pooled_width(model.pipeline)
    if width is not None:
        added["text_embeds"] = Input(("batch", width), model.dtype)
        added["time_ids"] = Input(("batch", 6), model.dtype, lambda generator, size: torch.full(size, 256.0))
    if model.unet.config.time_cond_proj_dim is not None:
        added["timestep_cond"] = Input(("batch", int(model.unet.config.time_cond_proj_dim)), model.dtype)
    return added


def _sides(model: StoryModel) -> tuple[int, int]:
    """The model's own (height, width) in steps of the UNet's factor."""
    width, height = model.native_size
    return height // model.size_factor, width // model.size_factor


def _unet_sizes(
    model: StoryModel, **most: int
) -> tuple[dict[str, int], list[dict[str, int]], dict[str, int]]:
    """Sizes for the exporter, of the parity checks (one row that sees nothing; usual; the most), and of most calls.

    most: the largest number of references, or of keys, that is checked.
    """
    height, width = _sides(model)
    text = int(model.pipeline.tokenizer.model_max_length)
    names = {"batch", "height", "width", *(("text", "references") if "references" in most else ("keys",))}
    hot = {"batch": 8, "height": height, "width": width, "text": text, "references": 9, "keys": 3 * text}
    traced = {"batch": 2, "height": 3, "width": 5, "text": text, "references": 9, "keys": 3 * text}
    if is_large(model):  # the arithmetic of small pictures is the same, the time is not
        height, width = 1, 1
    usual = {"batch": 2, "height": height, "width": width, "text": text, "references": 7, "keys": 3 * text}
    smallest = {"batch": 1, "height": height, "width": width, "text": text, "references": 1, "keys": text}
    other = {"batch": 3, "height": height + 1, "width": max(1, width - 1), "text": 2 * text, **most}
    parts = [{name: sizes[name] for name in sorted(names)} for sizes in (traced, smallest, usual, other, hot)]
    return parts[0], parts[1:4], parts[4]


def is_large(model: StoryModel) -> bool:
    """Whether the UNet is of full size, not one for a test."""
    return sum(p.numel() for p in model.unet.parameters()) > 5e7


def unet(model: StoryModel, groups: Groups) -> Component:
    """The UNet of iterative mode."""
    latents, ranges, out = _latents(model)
    kind, width, tokens = model.dtype, model.layers.width, model.tokens_per_ref

    def offsets(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """All references in the first group; the others are empty."""
        return torch.tensor([0] + [tokens * 1_000_000] * groups.count, dtype=torch.int32)

    def shared_out(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """A reference for every group but the last, which has the rest, or none where there are fewer."""
        return tokens * torch.tensor([*range(groups.count), 1_000_000], dtype=torch.int32)

    inputs = {
        **latents,
        "text_kv": Input(("batch", "text", width), kind),
        "ref_kv": Input((1, f"{tokens}*references", width), kind),
        "ref_visible": Input(("batch", "references"), torch.bool, random_mask),
        "ref_offsets": Input((groups.count + 1,), torch.int32, shared_out if groups.masked else offsets),
        "scale": Input((groups.count,), torch.float32, lambda generator, shape: torch.full(shape, 0.4)),
    }
    placed = _placed(model, groups)
    added = _added(model)
    traced, checks, hot = _unet_sizes(model, references=7 if is_large(model) else 100)
    return Component(
        "unet",
        _Unet(model.unet, tokens, tuple(placed), tuple(added)),
        {**inputs, **placed, **added},
        {"prediction": out},
        {**ranges, "text": RANGES["text"], "references": RANGES["references"]},
        traced,
        checks,
        kind,
        hot,
    )


def _placed(model: StoryModel, groups: Groups) -> dict[str, Input]:
    """Of each level of attention the groups' masks and, with boxes, the biases of text and of self-attention.

    Self-attention is bounded where a layer has at most BOUNDED tokens in a picture of the model's own size.
    """
    axes: dict[str, tuple[Axis, ...]] = {MASK: (groups.count, *SIDES)} if groups.masked else {}
    if groups.boxes:
        axes |= {TEXT_BIAS: (*SIDES, "text"), SELF_BIAS: (*SIDES, *SIDES)}
    return _by_level(model, axes)


def _by_level(model: StoryModel, axes: Mapping[str, tuple[Axis, ...]]) -> dict[str, Input]:
    """Inputs of each level of attention. axes: behind the batch, SIDES for height and width of the level."""
    found: dict[str, Input] = {}
    deepest = model.size_factor // model.vae_factor
    width, height = (side // model.vae_factor for side in model.native_size)
    bounded = Grid(height, width).bounded_layers()
    for level in self_attention_levels(model.unet):
        n = deepest // 2**level
        tokens = (height // 2**level) * (width // 2**level)
        for what, behind in axes.items():
            if what == SELF_BIAS and tokens not in bounded:
                continue
            shape = tuple(f"{n}*{axis}" if axis in SIDES and n > 1 else axis for axis in behind)
            make = random_shares if what == MASK else random_bias
            found[level_name(what, level)] = Input(("batch", *shape), torch.float32, make)
    return found


def unet_causal(model: StoryModel, boxes: bool = False) -> Component:
    """The UNet of causal mode with a window of any length. model: StoryModel.causal. boxes: as of Groups."""
    latents, ranges, out = _latents(model)
    placed = _by_level(model, {HISTORY_BIAS: (*SIDES, "keys"), SELF_BIAS: (*SIDES, *SIDES)}) if boxes else {}
    inputs = {
        **latents,
        "kv": Input(("batch", "keys", model.layers.width), model.dtype),
        # A sum of scores and biases has no answer for a row that sees nothing, which no call has.
        "padding": Input(("batch", "keys"), torch.bool, some_padding if boxes else random_padding),
        **placed,
    }
    added = _added(model)
    text = int(model.pipeline.tokenizer.model_max_length)
    traced, checks, hot = _unet_sizes(model, keys=9 * text)
    return Component(
        "unet_causal",
        _CausalUnet(model.unet, tuple(placed), tuple(added)),
        {**inputs, **added},
        {"prediction": out},
        {**ranges, "keys": RANGES["keys"]},
        traced,
        checks,
        model.dtype,
        hot,
    )
