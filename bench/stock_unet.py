"""The peer of a whole step: diffusers' own UNet call with its IP-Adapter, projections and all, as its pipelines make it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from fastory import StoryModel


def stock_unet(model: StoryModel) -> UNet2DConditionModel:
    """A UNet of the model's sizes with the model's weights and its adapter's, drawn on by diffusers' own processors."""
    adapter = model.adapter
    assert adapter is not None
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with model.device:
            unet = UNet2DConditionModel.from_config(model.unet.config)
    finally:
        torch.set_default_dtype(before)
    unet.load_state_dict(model.unet.state_dict())
    layers: dict[str, Tensor] = {}
    for n, (key, value) in enumerate(zip(adapter.key_weights, adapter.value_weights, strict=True)):
        layers |= {f"{2 * n + 1}.to_k_ip.weight": key, f"{2 * n + 1}.to_v_ip.weight": value}
    projection = adapter.image_projection
    image = {
        "proj.weight": projection.image_embeds.weight,
        "proj.bias": projection.image_embeds.bias,
        "norm.weight": projection.norm.weight,
        "norm.bias": projection.norm.bias,
    }
    unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": layers}])
    return unet.to(model.device, model.dtype).eval().requires_grad_(False)


def stock_call(model: StoryModel, frames: int, references: int, backend: str | None) -> Callable[[], Tensor]:
    """A call of it for `frames` frames under guidance. backend: of torch.compile for the repeated blocks, None for eager."""
    unet = stock_unet(model)
    if backend is not None:
        torch._dynamo.reset()
        unet.compile_repeated_blocks(fullgraph=True, backend=backend)
    width, height = model.native_size
    rows, options = 2 * frames, {"device": model.device, "dtype": model.dtype}
    caption = model.encode_caption("a fox")
    image_width = model.checkpoint.image_encoder.config.projection_dim  # type: ignore[union-attr]
    latents = torch.randn(rows, 4, height // model.vae_factor, width // model.vae_factor, **options)
    text = caption.tokens.expand(rows, -1, -1).contiguous()
    images = torch.randn(rows, references, image_width, **options)
    added: dict[str, Any] = {"image_embeds": [images]}
    if caption.pooled is not None:
        row = model.added_conditions(caption.pooled, width, height)
        added |= {name: value.repeat(rows, 1) for name, value in row.items()}
    timestep = torch.tensor(500, device=model.device)

    def call() -> Tensor:
        return unet(
            latents, timestep, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]

    return call
