"""GRCA for anybody's diffusers pipeline: its IP-Adapters stay as they were loaded, our operator computes them.

    pipe.load_ip_adapter(...)
    fastory.install(pipe)
    pipe(prompt, ip_adapter_image=[references]).images

A story's own model projects its references once (fastory.processors.projected); a stock pipeline gives its UNet new ones at
every step, so here they are projected where diffusers does it, in the layer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import (
    Attention,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)
from torch import Tensor, nn

from fastory.errors import InputError
from fastory.kernels.grca import grca

STOCK = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
# Where the operator has an implementation.
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Adapter:
    """What one IP-Adapter adds to one call of a layer.

    tokens: (B, N, T, C_x), N references of T tokens. mask: (1, N, H, W) or None. scale: a number for all N in one
    softmax, or one a reference, each with a softmax of its own.
    """

    tokens: Tensor
    scale: float | list[float]
    mask: Tensor | None
    to_k: nn.Module
    to_v: nn.Module

    @property
    def separate(self) -> bool:
        """Whether each reference has a softmax of its own, as diffusers has it under masks."""
        return self.mask is not None or isinstance(self.scale, list)

    @property
    def scales(self) -> list[float]:
        """The weight of each group."""
        if isinstance(self.scale, list):
            return self.scale
        return [self.scale] * (self.tokens.shape[1] if self.separate else 1)

    @property
    def lengths(self) -> list[int]:
        """The keys of each group."""
        references, tokens = self.tokens.shape[1:3]
        return [tokens] * references if self.separate else [references * tokens]

    @property
    def off(self) -> bool:
        """Whether it adds nothing, so that diffusers does not even project it."""
        return not any(self.scales)

    def placed(self, queries: int, like: Tensor) -> Tensor:
        """Where in a layer of `queries` tokens each group applies: (groups, queries) in the type of `like`."""
        if self.mask is None:
            return like.new_ones(len(self.lengths), queries)
        shrunk = IPAdapterMaskProcessor.downsample(self.mask[0], 1, queries, 1)
        return shrunk[..., 0].to(device=like.device, dtype=like.dtype)

    def fits(self, rows: int) -> bool:
        """Whether diffusers defines what this means for `rows` rows; else its own code says what is wrong."""
        if self.tokens.ndim != 4 or self.tokens.shape[0] != rows:
            return False
        if not all(isinstance(scale, (int, float)) for scale in self.scales):
            return False
        references = self.tokens.shape[1]
        if isinstance(self.scale, list) and len(self.scale) != references:
            return False
        if self.mask is None:
            return True
        return (
            isinstance(self.mask, Tensor)
            and self.mask.ndim == 4
            and tuple(self.mask.shape[:2]) == (1, references)
        )


class GRCAProcessor(IPAdapterAttnProcessor2_0):
    """Cross-attention of a layer with one or more IP-Adapters, text and references in one call of grca.

    It holds the modules and the scales of the processor it stands for, so that state-dict keys,
    pipe.set_ip_adapter_scale and pipe.unload_ip_adapter are as before. Equal to diffusers' own within rounding:
    one softmax over all references of an adapter, one a reference where ip_adapter_masks are given. One thing it adds:
    a list of scales, one a reference, without masks, of which diffusers makes a TypeError, is one softmax a reference.

    diffusers' own code runs where a layer or a call has what SD1.5's and SDXL's do not have: attention_mask, norms
    inside the attention (spatial_norm, group_norm, norm_cross), residual_connection, rescale_output_factor, hidden
    states of four dimensions, encoder_hidden_states that are no tuple, devices but CPU and CUDA; where every adapter
    is off (scale 0); and for what it refuses, so that its message is the one that is seen.
    """

    def __init__(self, stock: Any) -> None:
        """stock: the processor of diffusers whose modules and scales are used on."""
        with torch.device("meta"):  # its own weights are dropped in the next lines: none are made
            super().__init__(stock.hidden_size, stock.cross_attention_dim, stock.num_tokens, stock.scale)
        self.to_k_ip, self.to_v_ip = stock.to_k_ip, stock.to_v_ip
        # In a tuple: as an attribute of its own it would be a submodule, and its weights twice in the state dict.
        self._stock = (stock,)
        self.train(stock.training)

    def restore(self) -> Any:
        """The processor this one stands for, with the scales that were set since."""
        (stock,) = self._stock
        stock.scale = self.scale
        return stock

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        """hidden_states (B, L, C) -> (B, L, C). encoder_hidden_states: (text (B, Lt, C_x), [(B, N, T, C_x), ...])."""
        adapters = None
        if attention_mask is None and _is_plain(attn, hidden_states):
            adapters = self._adapters(hidden_states.shape[0], encoder_hidden_states, ip_adapter_masks)
        if not adapters:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks
            )
        out = _attend(attn, hidden_states, encoder_hidden_states[0], adapters)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))

    def _adapters(self, rows: int, states: Any, masks: Any) -> list[Adapter] | None:
        """The adapters that are on in this layer; None where diffusers' own code has to see to it."""
        if not isinstance(states, tuple) or states[0].shape[0] != rows:
            return None
        count = len(self.scale)
        if masks is None:
            masks = [None] * count
        elif isinstance(
            masks, Tensor
        ):  # of one reference an adapter, (adapters, 1, H, W), as diffusers once took them
            masks = list(masks.unsqueeze(1))
        if not len(masks) == len(states[1]) == count:
            return None
        parts = zip(states[1], self.scale, masks, self.to_k_ip, self.to_v_ip, strict=True)
        adapters = [Adapter(*part) for part in parts]
        if not all(adapter.fits(rows) for adapter in adapters):
            return None
        return [adapter for adapter in adapters if not adapter.off]


def _is_plain(attn: Attention, hidden_states: Tensor) -> bool:
    """Whether a layer is cross-attention as SD1.5 and SDXL have it, on a device with our operator."""
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.residual_connection)
    return (
        not any(extras)
        and attn.rescale_output_factor == 1.0
        and hidden_states.ndim == 3
        and hidden_states.device.type in DEVICES
    )


def _attend(attn: Attention, hidden_states: Tensor, text: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """(B, L, H, d): the text, and the groups of all adapters side by side as keys of one call."""
    heads = (attn.heads, -1)
    query = attn.to_q(hidden_states).unflatten(-1, heads)
    keys = [adapter.to_k(adapter.tokens.flatten(1, 2)) for adapter in adapters]
    values = [adapter.to_v(adapter.tokens.flatten(1, 2)) for adapter in adapters]
    scales = tuple(float(scale) for adapter in adapters for scale in adapter.scales)
    ends = itertools.accumulate((length for adapter in adapters for length in adapter.lengths), initial=0)
    masked = any(adapter.mask is not None for adapter in adapters)
    return grca(
        query,
        attn.to_k(text).unflatten(-1, heads),
        attn.to_v(text).unflatten(-1, heads),
        torch.cat(keys, 1).unflatten(-1, heads),
        torch.cat(values, 1).unflatten(-1, heads),
        _constant(scales, torch.promote_types(query.dtype, torch.float32), query.device),
        ref_offsets=None if len(scales) == 1 else _constant(tuple(ends), torch.int32, query.device),
        mask=torch.cat([adapter.placed(query.shape[1], query) for adapter in adapters])[None]
        if masked
        else None,
    )


@functools.lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the device, copied there once: a copy in every layer of every step would wait for the device."""
    with torch.inference_mode(False):  # the next caller may train
        return torch.tensor(values, dtype=dtype, device=device)


def install(pipe: Any) -> None:
    """Draw with GRCA in a diffusers pipeline: txt2img, img2img, inpainting, ControlNet; SD1.5 and SDXL.

    pipe: a pipeline with a UNet (or the UNet), its IP-Adapters loaded by load_ip_adapter. From now on its calls take
    ip_adapter_image or ip_adapter_image_embeds, ip_adapter_masks and set_ip_adapter_scale as before, and our operator
    computes the cross-attention; all else stays diffusers'. After load_ip_adapter install again. Installing twice is
    installing once. Raises InputError where there is no UNet, or none with an IP-Adapter.
    """
    unet = _unet(pipe)
    processors = dict(unet.attn_processors)
    ours = {name: GRCAProcessor(found) for name, found in processors.items() if type(found) in STOCK}
    if not ours and not any(isinstance(found, GRCAProcessor) for found in processors.values()):
        raise InputError(
            f"install: the {type(unet).__name__} has no layer with diffusers' IP-Adapter processors; wanted: an "
            "IP-Adapter loaded by pipe.load_ip_adapter(...) before fastory.install(pipe)"
        )
    unet.set_attn_processor(processors | ours)


def uninstall(pipe: Any) -> None:
    """Put back the very processors that `install` found, with the scales set since.

    Layers whose processors were changed since (load_ip_adapter, unload_ip_adapter) stay as they are. Raises InputError
    where there is no UNet.
    """
    unet = _unet(pipe)
    processors = dict(unet.attn_processors)
    stock = {name: found.restore() for name, found in processors.items() if isinstance(found, GRCAProcessor)}
    unet.set_attn_processor(processors | stock)


def _unet(pipe: Any) -> Any:
    unet = getattr(pipe, "unet", pipe)
    if isinstance(unet, nn.Module) and hasattr(unet, "_load_ip_adapter_weights"):
        return unet
    raise InputError(
        f"wanted a diffusers pipeline with a UNet, as StableDiffusionPipeline and StableDiffusionXLPipeline; got "
        f"{type(pipe).__name__}"
    )
