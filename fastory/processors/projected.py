"""Attention of a UNet: processors that read projected K and V. The only file that knows diffusers and the kernels.

A context is projected once and read by every layer at every step (architecture.md, idea 1). All layers stand side
by side in one tensor (rows, tokens, W), W = 2 * sum of C over the cross-attention layers: layer n with C channels
holds K in [offset, offset + C) and V in [offset + C, offset + 2C).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from fastory.errors import InputError
from fastory.kernels.banded import banded_causal_attention
from fastory.kernels.grca import grca


@dataclass(frozen=True)
class Layer:
    """Where a cross-attention layer's K and V stand in the wide tensor."""

    name: str
    attn: Attention
    offset: int
    channels: int

    def keys_values(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Views (rows, tokens, H, d) of this layer's K and V in (rows, tokens, W)."""
        heads = self.attn.heads
        shape = (*kv.shape[:2], heads, self.channels // heads)
        keys = kv[..., self.offset : self.offset + self.channels]
        values = kv[..., self.offset + self.channels : self.offset + 2 * self.channels]
        return keys.unflatten(-1, shape[2:]), values.unflatten(-1, shape[2:])


class Context(Protocol):
    """What the cross-attention layers of one UNet call attend to.

    per_row: tensors of one row a UNet row, which the sampler fills frame by frame and never replaces.
    """

    @property
    def per_row(self) -> tuple[Tensor, ...]: ...

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        """query (B, L, H, d) -> (B, L, H, d)."""


class Shared(Protocol):
    """What all frames of a round share of a context: makes contexts of any number of rows, and refills one."""

    def context(self, rows: int) -> Context:
        """A context with zeros in its per_row tensors."""

    def refill(self, context: Context) -> bool:
        """Write the shared part where `context` holds it. False, and nothing written, where the shapes differ."""


@dataclass(frozen=True)
class ReferenceContext:
    """Text, and references with their own weights (algorithms.md, section 1, grouped form).

    text_kv: (B, Lt, W). ref_kv: (1, Lr, W), every row reads it without a copy; Lr = 0 in a call without references.
    scale: (G,) weight l_g of each group. ref_visible: (B, Lr / tokens_per_ref) bool. ref_offsets: (G + 1,) int32.
    masks: for a layer of L query tokens, masks[L] is (B or 1, G, L) in [0, 1].
    """

    text_kv: Tensor
    ref_kv: Tensor
    scale: Tensor
    ref_visible: Tensor
    ref_offsets: Tensor
    tokens_per_ref: int
    masks: dict[int, Tensor] | None = None

    @property
    def per_row(self) -> tuple[Tensor, ...]:
        """Text K/V, and which references a row sees."""
        return self.text_kv, self.ref_visible

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        """Global reference cross-attention (Story-Adapter, arXiv 2410.06244, eq. of GRCA)."""
        k_text, v_text = layer.keys_values(self.text_kv)
        k_ref, v_ref = layer.keys_values(self.ref_kv)
        return grca(
            query,
            k_text,
            v_text,
            k_ref,
            v_ref,
            self.scale,
            tokens_per_ref=self.tokens_per_ref,
            ref_offsets=self.ref_offsets,
            ref_visible=self.ref_visible,
            mask=None if self.masks is None else self.masks[query.shape[1]],
        )


@dataclass(frozen=True)
class References:
    """References that all frames of a round share. ref_kv (1, Lr, W), scale (G,), offsets (G + 1,) int32."""

    ref_kv: Tensor
    scale: Tensor
    offsets: Tensor
    tokens_per_ref: int
    text_tokens: int

    def context(self, rows: int) -> ReferenceContext:
        """Room for the captions of `rows` rows beside these references."""
        width, blocks = self.ref_kv.shape[2], self.ref_kv.shape[1] // self.tokens_per_ref
        return ReferenceContext(
            text_kv=self.ref_kv.new_zeros(rows, self.text_tokens, width),
            ref_kv=self.ref_kv,
            scale=self.scale,
            ref_visible=torch.zeros(rows, blocks, dtype=torch.bool, device=self.ref_kv.device),
            ref_offsets=self.offsets,
            tokens_per_ref=self.tokens_per_ref,
        )

    def refill(self, context: Context) -> bool:
        """Other references of the same number, in the same buffers."""
        if (
            not isinstance(context, ReferenceContext)
            or context.ref_kv.shape != self.ref_kv.shape
            or context.scale.shape != self.scale.shape
            or context.text_kv.shape[1] != self.text_tokens
        ):
            return False
        context.ref_kv.copy_(self.ref_kv)
        context.scale.copy_(self.scale)
        context.ref_offsets.copy_(self.offsets)
        return True


@dataclass(frozen=True)
class HistoryContext:
    """A caption and the last L_M frames of a story (Causal-Story; algorithms.md, section 2).

    kv: (B, Lt + L_M * S, W), the caption's tokens, then S tokens a frame, oldest frame first, empty places last.
    padding: (B, Lt + L_M * S) bool, True for a key that nobody sees.
    """

    kv: Tensor
    padding: Tensor
    caption_tokens: int
    frame_tokens: int

    @property
    def per_row(self) -> tuple[Tensor, ...]:
        """K/V and their padding: every row has a story of its own."""
        return self.kv, self.padding

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        """Every pixel stands after the newest frame of the window and sees the caption and the whole window."""
        keys, values = layer.keys_values(self.kv)
        frames = (self.kv.shape[1] - self.caption_tokens) // self.frame_tokens
        return banded_causal_attention(
            query,
            keys,
            values,
            group_size=self.frame_tokens,
            window=frames,
            query_group=max(0, frames - 1),
            query_group_size=0,
            key_padding=self.padding,
            prefix=self.caption_tokens,
        )


@dataclass(frozen=True)
class Window:
    """The sizes of a history window: Lt tokens of the caption, `frames` (L_M) of S tokens each; `like` gives W."""

    caption_tokens: int
    frame_tokens: int
    frames: int
    like: Tensor

    def context(self, rows: int) -> HistoryContext:
        """An empty window for `rows` rows."""
        keys = self.caption_tokens + self.frames * self.frame_tokens
        kv = self.like.new_zeros(rows, keys, self.like.shape[-1])
        padding = torch.ones(rows, keys, dtype=torch.bool, device=kv.device)
        return HistoryContext(kv, padding, self.caption_tokens, self.frame_tokens)

    def refill(self, context: Context) -> bool:
        """Nothing is shared: a context of these sizes is good as it is."""
        keys = self.caption_tokens + self.frames * self.frame_tokens
        return (
            isinstance(context, HistoryContext)
            and context.kv.shape[1] == keys
            and context.caption_tokens == self.caption_tokens
        )


class SelfAttention(AttnProcessor2_0):
    """diffusers' self-attention, told to let the context pass: cross_attention_kwargs reach attn1 as well."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


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
            _refuse_unknown(name, attn)
            self.layers.append(Layer(name, attn, offset, attn.inner_dim))
            offset += 2 * attn.inner_dim
        self.width = offset
        self.key_weights, self.value_weights = tuple(key_weights), tuple(value_weights)
        processors: dict[str, Any] = {name: SelfAttention() for name in unet.attn_processors}
        processors |= {layer.name: CrossAttention(layer) for layer in self.layers}
        unet.set_attn_processor(processors)

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


def _refuse_unknown(name: str, attn: Attention) -> None:
    """GRCA covers cross-attention as SD1.5 and SDXL have it. Anything else would be drawn wrongly, so it is refused."""
    extras = [
        what
        for what in ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "residual_connection")
        if getattr(attn, what, None)
    ]
    if attn.rescale_output_factor != 1.0:
        extras.append("rescale_output_factor")
    if extras:
        raise InputError(
            f"the UNet's layer {name} has {', '.join(extras)}; wanted: cross-attention as in SD1.5 and SDXL. "
            "Use a checkpoint of one of these families."
        )
