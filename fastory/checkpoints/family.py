"""The families of UNets, SD1.5 and SDXL: all that one does otherwise than the other stands in this table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fastory.errors import InputError

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline


@dataclass(frozen=True)
class Family:
    """One kind of model: its stock pipeline, the parts with weights, those without, and what is particular to it.

    addition_embed_type: of the UNet's config; `text_time` takes a pooled text and the picture's size as inputs.
    vae_in_half: float16 is wide enough for the VAE. causal: causal mode has been trained for such a UNet.
    pipeline_options: what the pipeline takes besides its parts.
    """

    name: Literal["sd15", "sdxl"]
    title: str
    pipeline: type[Pipeline]
    parts: dict[str, Any]
    others: tuple[str, ...]
    addition_embed_type: Literal["text_time"] | None
    vae_in_half: bool
    causal: bool
    pipeline_options: tuple[str, ...]

    @property
    def pooled(self) -> bool:
        """A UNet call takes the pooled text and the picture's size."""
        return self.addition_embed_type == "text_time"

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The pipeline's tokenizers, by the names of its parts."""
        return tuple(name for name in self.others if name.startswith("tokenizer"))

    def vae_dtype(self, dtype: torch.dtype, vae: AutoencoderKL) -> torch.dtype:
        """The type that `vae` decodes in where the UNet draws in `dtype`.

        float16 where it is wide enough, as SDXL's is whose config says `force_upcast: false`. bfloat16 would be, but changes
        every fifth 8-bit value (the built-in model's, 2026-11), so it is float32.
        """
        safe = self.vae_in_half or not vae.config.get("force_upcast", True)
        return vae.dtype if safe or dtype != torch.float16 else torch.float32

    def pooled_width(self, pipeline: Any) -> int | None:
        """The width of the pooled text; None where a UNet call takes none."""
        return int(pipeline.text_encoder_2.config.projection_dim) if self.pooled else None

    def encode_prompt(self, pipeline: Any, prompt: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Caption tokens (1, Lt, C_x) and the pooled text (1, P), or None, as the stock pipeline encodes them."""
        encoded = pipeline.encode_prompt(
            prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return encoded[0], encoded[2] if self.pooled else None

    def require_causal(self, name: str) -> None:
        """InputError, which names the model `name`, where causal mode cannot draw with such a UNet."""
        if not self.causal:
            wanted = " or ".join(family.title for family in FAMILIES.values() if family.causal)
            raise InputError(f"{name} is an {self.title} model; wanted a UNet of {wanted} for causal mode")


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "sd15",
            "Stable Diffusion 1.5",
            StableDiffusionPipeline,
            {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel},
            ("tokenizer", "scheduler"),
            addition_embed_type=None,
            vae_in_half=True,
            causal=True,
            pipeline_options=("safety_checker", "requires_safety_checker"),
        ),
        Family(
            "sdxl",
            "SDXL",
            StableDiffusionXLPipeline,
            {
                "unet": UNet2DConditionModel,
                "vae": AutoencoderKL,
                "text_encoder": CLIPTextModel,
                "text_encoder_2": CLIPTextModelWithProjection,
            },
            ("tokenizer", "tokenizer_2", "scheduler"),
            addition_embed_type="text_time",
            vae_in_half=False,  # it overflows in float16, as its config's force_upcast says
            causal=False,
            pipeline_options=("force_zeros_for_empty_prompt",),
        ),
    )
}
PIPELINES = {family.pipeline.__name__: family for family in FAMILIES.values()}


def family_of_encoders(count: int) -> Family:
    """The family whose stock pipeline has `count` text encoders."""
    return next(family for family in FAMILIES.values() if len(family.tokenizers) == count)
