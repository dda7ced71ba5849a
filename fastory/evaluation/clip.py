"""Features of captions and pictures in one space: a CLIP model as transformers saves it.

The field measures with OpenAI's CLIP ViT-B/32 (openai/clip-vit-base-patch32); the encoder is an argument, and every row says
which one made it. The built-in one is the drawn world's own pair, fastory.builtin.evaluation.pair: it takes no part in drawing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Model,
)

from fastory.builtin.evaluation.pair import FOLDER as PAIR
from fastory.checkpoints.hashes import model_hashes
from fastory.checkpoints.hub import encoder_path
from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import component_weights
from fastory.errors import InputError
from fastory.evaluation.choices import BUILTIN

AT_ONCE = 16  # pictures


class PictureEncoder(Protocol):
    """What gives L2-normalised features of pictures in float32. name: as a table names it; sha256: of the weights."""

    name: str
    sha256: str

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, D) features of 8-bit RGB pictures."""


class Encoder(PictureEncoder, Protocol):
    """The same of captions."""

    def captions(self, texts: Sequence[str]) -> Tensor:
        """(n, D) features of captions, cut at the tokenizer's limit."""


def open_encoder(name: str, *, device: str = "cpu", offline: bool = False) -> Encoder:
    """`builtin`, a folder, or an id of the hub. Raises InputError where it is neither here nor to be had."""
    if name == BUILTIN:
        return Clip(PAIR, device, BUILTIN)
    return Clip.open(name, device=device, offline=offline)


class Clip:
    """A CLIP model."""

    def __init__(self, folder: Path, device: str = "cpu", name: str | None = None) -> None:
        """folder: of config, weights (safetensors), tokenizer and picture preparation. Raises InputError for another one."""
        _, weights = component_weights(folder)  # pickles are refused with the command that converts them
        with loading(f"{folder} is not a CLIP model with its tokenizer and preprocessor"):
            opened: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self.model = opened.to(device, torch.float32).eval().requires_grad_(False)
        self.device, self.name, self.sha256 = device, name or str(folder), hash_of(weights)

    @classmethod
    def open(cls, name: str, *, device: str = "cpu", offline: bool = False) -> Clip:
        """A folder, or an id of the hub. Raises InputError where it is neither here nor to be had."""
        return cls(encoder_path(name, offline=offline), device, name)

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
        return normalised(self.model.text_projection(pooled))

    @torch.inference_mode()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, D) features of 8-bit RGB pictures."""
        pixels = pixels_of(self.processor, images)
        pooled = self.model.vision_model(pixels.to(self.device)).pooler_output
        return normalised(self.model.visual_projection(pooled))


class Dino:
    """A DINOv2 as transformers saves it."""

    def __init__(self, name: str, *, device: str = "cpu", offline: bool = False) -> None:
        """name: a folder, or an id of the hub. Raises InputError where it is neither here nor to be had."""
        folder = encoder_path(name, offline=offline)
        _, weights = component_weights(folder)
        with loading(f"{folder} is not a DINOv2 with its preprocessor"):
            opened: Any = Dinov2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self.processor = BitImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self.model = opened.to(device, torch.float32).eval().requires_grad_(False)
        self.device, self.name, self.sha256 = device, name, hash_of(weights)

    @torch.inference_mode()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, D) class tokens of 8-bit RGB pictures, after the last normalisation."""
        pixels = pixels_of(self.processor, images)
        return normalised(self.model(pixels.to(self.device)).last_hidden_state[:, 0])


def pixels_of(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    """(n, 3, h, w) as an encoder takes pictures. Raises InputError for none."""
    if not images:
        raise InputError("no picture to look at")
    return processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values


def in_parts(encoder: PictureEncoder, images: Sequence[Image.Image]) -> Tensor:
    """(n, D) features, so many pictures at once as memory bears."""
    return torch.cat([encoder.pictures(part) for part in parts(images)])


def parts(images: Sequence[Image.Image]) -> Iterator[Sequence[Image.Image]]:
    """The pictures, AT_ONCE at a time."""
    yield from (images[first : first + AT_ONCE] for first in range(0, len(images), AT_ONCE))


def hash_of(weights: Sequence[Path]) -> str:
    """The SHA-256 of a weight file; of several, the SHA-256 of theirs, in the names' order."""
    found = [digest for _, digest in sorted(model_hashes(weights).items())]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def normalised(features: Tensor) -> Tensor:
    """Of length 1, in float32, on the CPU."""
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()
