"""Attention of a UNet: processors that read projected K and V. The only file that knows diffusers and the kernels.

A context is projected once and read by every layer at every step (architecture.md, idea 1). All layers stand side
by side in one tensor (rows, tokens, W), W = 2 * sum of C over the cross-attention layers: layer n with C channels
holds K in [offset, offset + C) and V in [offset + C, offset + 2C).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from fastory.errors import InputError
from fastory.kernels import backends
from fastory.kernels.banded import banded_causal_attention
from fastory.kernels.grca import grca
from fastory.processors.attention_backends import BACKENDS
from fastory.processors.fused import is_fused


@dataclass(frozen=True)
class Layer:
    """Where a cross-attention layer's K and V stand in the wide tensor."""

    name: str
    attn: Attention
    offset: int
    channels: int

    def cut(self, kv: Tensor) -> Tensor:
        """This layer's K and V side by side, (rows, tokens, 2C), in the memory of (rows, tokens, W)."""
        return kv[..., self.offset : self.offset + 2 * self.channels]

    def keys_values(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Views (rows, tokens, H, d) of this layer's K and V in (rows, tokens, W), or in what `cut` gave."""
        keys, values = (kv if kv.shape[-1] == 2 * self.channels else self.cut(kv)).chunk(2, -1)
        heads = (self.attn.heads, self.channels // self.attn.heads)
        return keys.unflatten(-1, heads), values.unflatten(-1, heads)


class Context(Protocol):
    """What the cross-attention layers of one UNet call attend to."""

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        """query (B, L, H, d) -> (B, L, H, d)."""


def attend_references(
    layer: Layer,
    query: Tensor,
    *,
    text_kv: Tensor,
    ref_kv: Tensor,
    scale: Tensor,
    tokens_per_ref: int,
    ref_offsets: Tensor,
    ref_visible: Tensor,
    mask: Tensor | None,
    ref_ranges: Tensor | None = None,
    text_bias: Tensor | None = None,
) -> Tensor:
    """Global reference cross-attention of one layer (Story-Adapter, arXiv 2410.06244, eq. of GRCA).

    query (B, L, H, d) -> (B, L, H, d). text_kv (B, Lt, W) and ref_kv (1, Lr, W) hold all layers side by side; the rest
    is the operator's, see fastory.kernels.grca. text_bias (B, L, Lt) is added to the scores of the text's tokens.
    """
    k_text, v_text = layer.keys_values(text_kv)
    k_ref, v_ref = layer.keys_values(ref_kv)
    text: Tensor | None = None
    if text_bias is not None:
        text = attend_biased(query, k_text, v_text, text_bias)
        # The operator has no bias of text; one key without value leaves it the references alone.
        k_text = v_text = torch.zeros_like(k_text[:, :1])
    out = grca(
        query,
        k_text,
        v_text,
        k_ref,
        v_ref,
        scale,
        tokens_per_ref=tokens_per_ref,
        ref_offsets=ref_offsets,
        ref_visible=ref_visible,
        mask=mask,
        ref_ranges=ref_ranges,
    )
    return out if text is None else text + out


def attend_all(query: Tensor, keys: Tensor, values: Tensor, backend: str | None = None) -> Tensor:
    """Self-attention: query, keys, values (B, L, H, d) -> (B, L, H, d). backend: None for PyTorch's choice."""
    attend = (
        functional.scaled_dot_product_attention
        if backend is None
        else BACKENDS[query.device.type][backend].attend
    )
    return attend(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)).transpose(1, 2)


def attend_biased(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention whose scores have bias (B, L, K) added: query (B, L, H, d), keys and values (B, K, H, d) -> (B, L, H, d)."""
    heads_first = (query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
    mask = bias[:, None].to(query.dtype)
    return functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def attend_window(
    layer: Layer,
    query: Tensor,
    *,
    kv: Tensor,
    padding: Tensor,
    caption_tokens: int,
    frame_tokens: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of one layer to a caption and a window of earlier frames (Causal-Story, ICASSP 2024, section 2.3).

    query (B, L, H, d) -> (B, L, H, d). kv (B, Lt + L_M * S, W) and padding (B, Lt + L_M * S). Every pixel stands after
    the newest frame of the window and sees the caption and the whole window. bias (B, L, Lt + L_M * S) is added to the scores.
    """
    keys, values = layer.keys_values(kv)
    if bias is not None:  # the operator has none; and with every pixel behind the window there is no band
        return attend_biased(query, keys, values, bias.masked_fill(padding[:, None], -torch.inf))
    frames = (kv.shape[1] - caption_tokens) // frame_tokens
    return banded_causal_attention(
        query,
        keys,
        values,
        group_size=frame_tokens,
        window=frames,
        query_group=max(0, frames - 1),
        query_group_size=0,
        key_padding=padding,
        prefix=caption_tokens,
    )


class SelfAttention(AttnProcessor2_0):
    """diffusers' self-attention, but where Q, K and V are one product, and for contexts that have attention of their own.

    cross_attention_kwargs reach attn1, too. backend: that computes it, of attention_backends; None for PyTorch's choice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backend: str | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        # Frames see each other, or characters do not: for a layer of L tokens what takes query, keys, values (B, L, H, d)
        # to (B, L, H, d), or None.
        own = getattr(context, "self_attention", None)
        attend = None if own is None else own(hidden_states.shape[1])
        fused = is_fused(attn)
        if attend is None and not fused and self.backend is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if fused:
            projected = attn.to_qkv(hidden_states).chunk(3, -1)
        else:
            projected = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        attend = attend or partial(attend_all, backend=self.backend)
        out = attend(*(tensor.unflatten(-1, (attn.heads, -1)) for tensor in projected))
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class CrossAttention:
    """One cross-attention layer: its queries meet the context of the call."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """hidden_states (B, L, C) -> (B, L, C). K and V come from `context`; encoder_hidden_states is not read."""
        if context is None:
            raise TypeError(
                "this UNet draws with projected contexts: pass cross_attention_kwargs={'context': ...}"
            )
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        out = context.attend(self.layer, query)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class CrossAttentionLayers:
    """The cross-attention layers of one UNet, in diffusers' order, and their projections."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        key_weights: Sequence[Tensor] = (),
        value_weights: Sequence[Tensor] = (),
    ) -> None:
        """Install the processors. key_weights and value_weights are an IP-Adapter's to_k_ip and to_v_ip, one a layer."""
        self.layers: list[Layer] = []
        offset = 0
        for name in unet.attn_processors:
            if name.endswith("attn1.processor"):
                continue
            attn = unet.get_submodule(name.removesuffix(".processor"))
            assert isinstance(attn, Attention)
            refuse_unknown(name, attn)
            self.layers.append(Layer(name, attn, offset, attn.inner_dim))
            offset += 2 * attn.inner_dim
        self.width = offset
        self.key_weights, self.value_weights = tuple(key_weights), tuple(value_weights)
        processors: dict[str, Any] = {
            name: found if isinstance(found, SelfAttention) else SelfAttention()  # a copy's keeps its backend
            for name, found in unet.attn_processors.items()
        }
        processors |= {layer.name: CrossAttention(layer) for layer in self.layers}
        unet.set_attn_processor(processors)

    @property
    def value_columns(self) -> Tensor:
        """(W,) bool: True where the wide tensor holds values."""
        return value_columns(self.channels)

    @property
    def channels(self) -> list[int]:
        """Of the keys of each layer, and of its values."""
        return [layer.channels for layer in self.layers]

    def project_text(self, tokens: Tensor) -> Tensor:
        """tokens (B, Lt, C_x) -> (B, Lt, W) through to_k and to_v, each layer's own module, so a LoRA on them counts.

        In the type of what the modules give: under autocast, where adapters are trained, that is not the tokens'.
        """
        parts = [part for layer in self.layers for part in (layer.attn.to_k(tokens), layer.attn.to_v(tokens))]
        return torch.cat(parts, -1)

    def project_references(self, tokens: Tensor) -> Tensor:
        """tokens (1, Lr, C_x) -> (1, Lr, W) through the IP-Adapter's to_k_ip and to_v_ip."""
        out = tokens.new_empty(*tokens.shape[:2], self.width)
        for layer, key, value in zip(self.layers, self.key_weights, self.value_weights, strict=True):
            self._store(out, layer, functional.linear(tokens, key), functional.linear(tokens, value))
        return out

    @staticmethod
    def _store(out: Tensor, layer: Layer, keys: Tensor, values: Tensor) -> None:
        out[..., layer.offset : layer.offset + layer.channels] = keys
        out[..., layer.offset + layer.channels : layer.offset + 2 * layer.channels] = values


def value_columns(channels: Sequence[int]) -> Tensor:
    """(W,) bool: True where a wide tensor of layers with so many channels holds values, behind each layer's keys."""
    parts = [torch.tensor([False, True]).repeat_interleave(count) for count in channels]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def refuse_unknown(name: str, attn: Attention) -> None:
    """InputError for attention that is not as SD1.5 and SDXL have it, which would be drawn wrongly."""
    extras = [
        what
        for what in ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "residual_connection")
        if getattr(attn, what, None)
    ]
    if attn.rescale_output_factor != 1.0:
        extras.append("rescale_output_factor")
    if extras:
        raise InputError(
            f"the UNet's layer {name} has {', '.join(extras)}; wanted: attention as in SD1.5 and SDXL. "
            "Use a checkpoint of one of these families."
        )


def check_kernels(device: torch.device) -> None:
    """InputError where FASTORY_KERNELS names what does not exist or cannot run on `device`."""
    try:
        backends.choose(device)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{error}; unset {backends.VARIABLE}, or run `fastory doctor` to see what can run"
        ) from error
