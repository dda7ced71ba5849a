"""Pictures on their way into an image encoder and out of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastory.models.protocol import NOT_FINITE, Decoded

# The squash of the reference implementation: every reference becomes 256 x 256 before CLIP's own resizing.
SQUASH = 256


def fit_square(image: Image.Image, fit: str) -> Image.Image:
    """`image` made ready for CLIP's square: pad with CLIP's mean colour, squash to 256 x 256, or leave it to CLIP's crop."""
    if fit == "squash":
        return image.convert("RGB").resize((SQUASH, SQUASH), Image.Resampling.BICUBIC)
    if fit == "crop" or image.width == image.height:
        return image.convert("RGB")
    side = max(image.size)
    mean = tuple(int(v) for v in np.round(np.array([0.48145466, 0.4578275, 0.40821073]) * 255))
    square = Image.new("RGB", (side, side), mean)
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return square


def decoded(
    latents: Tensor,
    decode: Callable[[Tensor], Tensor],
    config: Mapping[str, Any],
    factor: int,
    image_processor: Any,
    is_unsafe: Callable[[Tensor], bool],
) -> Decoded:
    """latents (1, c, h, w) -> an 8-bit RGB picture; black and marked where values are not finite or unsafe.

    decode: the VAE's latents -> pixels (1, 3, H, W). config: the VAE's. factor: pixels per latent, a side.
    """
    height, width = (side * factor for side in latents.shape[-2:])
    black = Image.new("RGB", (width, height))
    pixels = decode(unscaled(latents, config))
    if not bool(torch.isfinite(pixels).all()):
        return Decoded(black, NOT_FINITE)
    if is_unsafe(pixels):
        return Decoded(black, "blacked out by the safety checker")
    image = image_processor.postprocess(pixels, output_type="pil", do_denormalize=[True])[0]
    return Decoded(image.convert("RGB"), None)


def scaled(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """From the VAE's latents to the UNet's: what `unscaled` undoes."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents * config["scaling_factor"]
    shape = (1, -1, 1, 1)
    mean_tensor, std_tensor = (latents.new_tensor(values).view(shape) for values in (mean, std))
    return (latents - mean_tensor) * config["scaling_factor"] / std_tensor


def unscaled(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """From the UNet's latents to the VAE's, as diffusers' pipelines do it."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents / config["scaling_factor"]
    shape = (1, -1, 1, 1)
    mean_tensor = torch.tensor(mean, device=latents.device, dtype=latents.dtype).view(shape)
    std_tensor = torch.tensor(std, device=latents.device, dtype=latents.dtype).view(shape)
    return latents * std_tensor / config["scaling_factor"] + mean_tensor
