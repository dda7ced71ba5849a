"""Encoders, projectors and the decoder of a model as components: all but its UNets and its history."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastory.errors import InputError
from fastory.export.component import RANGES, Axis, Component, Input, Reads, random_ids
from fastory.models.torch_model import StoryModel
from fastory.processors.projected import CrossAttentionLayers


class _TextEncoder(nn.Module):
    """One CLIP text encoder as the pipelines call it."""

    def __init__(self, encoder: nn.Module, penultimate: bool, pooled: bool) -> None:
        super().__init__()
        self.encoder, self.penultimate, self.pooled = encoder, penultimate, pooled

    def forward(self, ids: Tensor) -> Any:
        """ids (B, Lt) -> tokens (B, Lt, C), and pooled (B, P) where asked for."""
        out = self.encoder(ids, output_hidden_states=self.penultimate)
        tokens = out.hidden_states[-2] if self.penultimate else out.last_hidden_state
        return (tokens, out.text_embeds) if self.pooled else tokens


def text_encoders(model: StoryModel) -> list[Component]:
    """Of one encoder the last states; of two both ones' last but one, and the second one's pooled text."""
    names = [tokenizer.replace("tokenizer", "text_encoder") for tokenizer in model.family.tokenizers]
    encoders = [getattr(model.pipeline, name) for name in names]
    tokenizers = [getattr(model.pipeline, name) for name in model.family.tokenizers]
    several = len(names) > 1
    return [
        _clip(name, encoder, tokenizer, several, several and name == names[-1])
        for name, encoder, tokenizer in zip(names, encoders, tokenizers, strict=True)
    ]


def _clip(name: str, encoder: Any, tokenizer: Any, penultimate: bool, pooled: bool) -> Component:
    if getattr(encoder.config, "use_attention_mask", False):
        raise InputError(f"{name} wants an attention mask, which no Stable Diffusion text encoder has")
    length = int(tokenizer.model_max_length)
    tokens = ("batch", length, int(encoder.config.hidden_size))
    extra: dict[str, tuple[Axis, ...]] = (
        {"pooled": ("batch", int(encoder.config.projection_dim))} if pooled else {}
    )
    return Component(
        name,
        _TextEncoder(encoder, penultimate, pooled),
        {"ids": Input(("batch", length), torch.int64, random_ids(int(encoder.config.vocab_size)))},
        {"tokens": tokens, **extra},
        {"batch": RANGES["batch"]},
        {"batch": 2},
        [{"batch": n} for n in (1, 2, 5)],
        encoder.dtype,
        {"batch": 1},
    )


class _ImageEncoder(nn.Module):
    """CLIP's vision model with the adapter's projection."""

    def __init__(self, encoder: Any, projection: nn.Module, embedding: str, width: int) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.embedding, self.width = embedding, width

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, s, s) -> (B, T, C_x)."""
        if self.embedding == "image_embeds":
            embeds = self.encoder(pixels).image_embeds
        else:
            embeds = self.encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return self.projection(embeds).reshape(pixels.shape[0], -1, self.width)


def image_encoder(model: StoryModel) -> Component:
    """pixels -> the T tokens of a reference."""
    adapter, encoder = model.adapter, model.checkpoint.image_encoder
    assert adapter is not None and encoder is not None
    width, side = model.cross_attention_dim, model.checkpoint.image_processor.crop_size["height"]
    return Component(
        "image_encoder",
        _ImageEncoder(encoder, adapter.image_projection, adapter.embedding, width),
        {"pixels": Input(("batch", 3, side, side), model.dtype)},
        {"tokens": ("batch", adapter.tokens, width)},
        {"batch": RANGES["batch"]},
        {"batch": 2},
        [{"batch": n} for n in (1, 2, 3)],
        model.dtype,
        {"batch": 1},
    )


class _ReferenceProjector(nn.Module):
    """CrossAttentionLayers.project_references with the adapter's weights as parameters."""

    def __init__(self, layers: CrossAttentionLayers) -> None:
        super().__init__()
        pairs = zip(layers.key_weights, layers.value_weights, strict=True)
        weights = [nn.Parameter(weight, requires_grad=False) for pair in pairs for weight in pair]
        self.weights = nn.ParameterList(weights)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (1, Lr, C_x) -> (1, Lr, W)."""
        return torch.cat([nn.functional.linear(tokens, weight) for weight in self.weights], -1)


def reference_projector(model: StoryModel) -> Component:
    """Tokens of all references -> K and V of all layers."""
    length = f"{model.tokens_per_ref}*references"
    return Component(
        "reference_projector",
        _ReferenceProjector(model.layers),
        {"tokens": Input((1, length, model.cross_attention_dim), model.dtype)},
        {"kv": (1, length, model.layers.width)},
        {"references": RANGES["references"]},
        {"references": 9},
        [{"references": n} for n in (1, 7, 100)],
        model.dtype,
        {"references": 9},
    )


def text_projector(name: str, model: StoryModel) -> Component:
    """Tokens of captions -> K and V of all layers."""
    text = int(model.pipeline.tokenizer.model_max_length)
    parts = [part for layer in model.layers.layers for part in (layer.attn.to_k, layer.attn.to_v)]
    return Component(
        name,
        Reads(model.layers.project_text, parts),
        {"tokens": Input(("batch", "text", model.cross_attention_dim), model.dtype)},
        {"kv": ("batch", "text", model.layers.width)},
        {"batch": RANGES["batch"], "text": RANGES["text"]},
        {"batch": 2, "text": text},
        [{"batch": rows, "text": tokens} for rows, tokens in ((1, text), (2, 1), (3, 2 * text))],
        model.dtype,
        {"batch": 1, "text": text},
    )


class _VaeDecoder(nn.Module):
    """The decoding half of the autoencoder."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, c, h, w) -> pixels (B, 3, H, W)."""
        pixels: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return pixels


class _VaeEncoder(nn.Module):
    """The encoding half: the middle of the distribution that it gives."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) -> latents (B, c, h, w)."""
        latents: Tensor = self.vae.encode(pixels).latent_dist.mode()
        return latents


def vae_decoder(model: StoryModel) -> Component:
    """latents as the VAE takes them -> pixels about -1 .. 1."""
    latents, pixels = _sides(model)
    inputs = {"latents": Input(latents, model.vae.dtype)}
    return _autoencoder("vae_decoder", model, _VaeDecoder(model.vae), inputs, {"pixels": pixels})


def vae_encoder(model: StoryModel) -> Component:
    """pixels about -1 .. 1 -> latents as the VAE gives them."""
    latents, pixels = _sides(model)
    inputs = {"pixels": Input(pixels, model.vae.dtype)}
    return _autoencoder("vae_encoder", model, _VaeEncoder(model.vae), inputs, {"latents": latents})


def _sides(model: StoryModel) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Axes of latents and of their pixels."""
    channels, factor = int(model.vae.config.latent_channels), model.vae_factor
    return ("batch", channels, "height", "width"), ("batch", 3, f"{factor}*height", f"{factor}*width")


def _autoencoder(
    name: str,
    model: StoryModel,
    module: nn.Module,
    inputs: dict[str, Input],
    outputs: dict[str, tuple[Axis, ...]],
) -> Component:
    """One half of the autoencoder; sizes count latents."""
    height, width = (side // model.vae_factor for side in reversed(model.native_size))
    checks = [(1, min(height, 16), min(width, 16)), (2, 8, 12), (3, 12, 4)]
    return Component(
        name,
        module,
        inputs,
        outputs,
        {"batch": RANGES["batch"], "height": (1, 512), "width": (1, 512)},
        {"batch": 2, "height": 6, "width": 10},
        [dict(zip(("batch", "height", "width"), sizes, strict=True)) for sizes in checks],
        model.vae.dtype,
        {"batch": 1, "height": height, "width": width},
    )
