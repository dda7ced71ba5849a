"""Models from their configurations, with random weights: no file is read, and a step costs what it costs with others.

sd15 and sdxl have the sizes of the published models (their config.json files), CLIP ViT-H for references and a
base IP-Adapter of four tokens. small-sd15 and small-sdxl have the same blocks at a width that a CPU draws at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import ImageProjection
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from fastory import StoryModel
from fastory.checkpoints import Checkpoint, IPAdapter
from fastory.checkpoints.family import family_of_encoders
from fastory.runtime import Placement

TOKENS = 4
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Sizes:
    """What a model is made of. vae: channels of its levels; texts: (width, layers, heads) of each text encoder.

    vision: (width, layers, heads, patch, side, projection) of CLIP's image encoder.
    """

    unet: Mapping[str, Any]
    vae: tuple[int, ...] = (128, 256, 512, 512)
    scaling_factor: float = 0.18215
    force_upcast: bool = False
    texts: tuple[tuple[int, int, int], ...] = ((768, 12, 12),)
    vision: tuple[int, int, int, int, int, int] = (1280, 32, 16, 14, 224, 1024)
    groups: int = 32
    further: Mapping[str, Any] = field(default_factory=dict)


_SMALL = {"vae": (8, 8, 16, 16), "vision": (32, 2, 2, 8, 32, 24), "groups": 4}
SIZES: Mapping[str, Sizes] = {
    "sd15": Sizes(SD15_UNET),
    "sdxl": Sizes(
        SDXL_UNET, scaling_factor=0.13025, force_upcast=True, texts=((768, 12, 12), (1280, 32, 20))
    ),
    "small-sd15": Sizes(
        SD15_UNET
        | {
            "sample_size": 8,
            "block_out_channels": (16, 16, 32, 32),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
        },
        texts=((16, 2, 2),),
        **_SMALL,
    ),
    "small-sdxl": Sizes(
        SDXL_UNET
        | {
            "sample_size": 8,
            "block_out_channels": (16, 32, 32),
            "transformer_layers_per_block": (1, 1, 2),
            "cross_attention_dim": 40,
            "attention_head_dim": (2, 2, 4),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
        },
        scaling_factor=0.13025,
        force_upcast=True,
        texts=((16, 2, 2), (24, 2, 2)),
        **_SMALL,
    ),
}


@contextmanager
def _made_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """New weights in `dtype` on `device`, from a seed, so that no second copy of them is ever there."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), device:
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: it spells every word; limit 77."""
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _text(kind: Any, width: int, layers: int, heads: int, words: CLIPTokenizer) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def _vision(width: int, layers: int, heads: int, patch: int, side: int, projection: int) -> Any:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            patch_size=patch,
            image_size=side,
            projection_dim=projection,
            hidden_act="gelu",
        )
    )


def _pipeline(sizes: Sizes) -> Any:
    words = tokenizer()
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**sizes.unet, norm_num_groups=sizes.groups),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=sizes.vae,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=sizes.groups,
            sample_size=8 * sizes.unet["sample_size"],
            scaling_factor=sizes.scaling_factor,
            force_upcast=sizes.force_upcast,
        ),
        "text_encoder": _text(CLIPTextModel, *sizes.texts[0], words),
        "tokenizer": words,
        "feature_extractor": None,
        "image_encoder": None,
    }
    # The schedule's tables are on the CPU in float32, as a scheduler that is read from a folder has them.
    with torch.device("cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        parts["scheduler"] = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False)
        torch.set_default_dtype(before)
    if len(sizes.texts) == 1:
        return StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    second = _text(CLIPTextModelWithProjection, *sizes.texts[1], words)
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=words, add_watermarker=False)


def _adapter(unet: Any, projection: int) -> IPAdapter:
    """A base IP-Adapter: weights of the size that leaves K and V of unit variance."""
    width = int(unet.config.cross_attention_dim)
    image = ImageProjection(
        image_embed_dim=projection, cross_attention_dim=width, num_image_text_embeds=TOKENS
    )
    layers = [
        unet.get_submodule(name.removesuffix(".processor"))
        for name in unet.attn_processors
        if name.endswith("attn2.processor")
    ]
    keys, values = (
        tuple(torch.randn(layer.inner_dim, width) * width**-0.5 for layer in layers) for _ in "kv"
    )
    return IPAdapter("base", TOKENS, image.eval().requires_grad_(False), keys, values, "image_embeds")


def random_checkpoint(name: str, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """A checkpoint of SIZES[name], made in `dtype` on `device`."""
    sizes = SIZES[name]
    with _made_in(dtype, device):
        pipeline = _pipeline(sizes)
        adapter = _adapter(pipeline.unet, sizes.vision[-1])
        encoder = _vision(*sizes.vision).eval().requires_grad_(False)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    side = sizes.vision[4]
    return Checkpoint(
        pipeline=pipeline,
        family=family_of_encoders(len(sizes.texts)),
        image_encoder=encoder,
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        adapter=adapter,
        history=None,
        defaults={},
        sources=(),
    )


def random_model(name: str, placement: Placement) -> StoryModel:
    """A StoryModel of SIZES[name] where `placement` says."""
    return StoryModel(random_checkpoint(name, placement.dtype, placement.device), placement, f"random {name}")
