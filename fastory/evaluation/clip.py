"""Features of captions and pictures in one space: a CLIP model as transformers saves it.

The field measures with OpenAI's CLIP ViT-B/32 (openai/clip-vit-base-patch32); the encoder is an argument, and a table says
which one made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from fastory.checkpoints.hub import encoder_path
from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import component_weights
from fastory.errors import InputError


class Clip:
    """A CLIP model that gives L2-normalised features in float32."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """folder: of config, weights (safetensors), tokenizer and picture preparation. Raises InputError for another one."""
        component_weights(folder)  # pickles are refused with the command that converts them
        with loading(f"{folder} is not a CLIP model with its tokenizer and preprocessor"):
            opened: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self.model = opened.to(device, torch.float32).eval().requires_grad_(False)
        self.device = device

    @classmethod
    def open(cls, name: str, *, device: str = "cpu", offline: bool = False) -> Clip:
        """A folder, or an id of the hub. Raises InputError where it is neither here nor to be had."""
        return cls(encoder_path(name, offline=offline), device)

    @torch.inference_mode()
    def captions(self, texts: Sequence[str]) -> Tensor:
        """(n, D) features of captions, cut at the tokenizer's limit."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return _normalised(self.model.text_projection(pooled))

    @torch.inference_mode()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, D) features of 8-bit RGB pictures."""
        if not images:
            raise InputError("no picture to look at")
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        pooled = self.model.vision_model(pixels.to(self.device)).pooler_output
        return _normalised(self.model.visual_projection(pooled))


def _normalised(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()
