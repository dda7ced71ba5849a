"""Writes small but complete checkpoints: the classes, key names and file layout of real ones, with seeded
random weights.

A picture is 64x64 (the VAE's factor is 8, as in the real models), so a UNet call sees 8x8 latents. Widths
are chosen so that no two sizes that could be mixed up are equal: the image encoder's hidden width, its
projection and the UNet's text width differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
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

TEXT = "a the red blue fox rabbit robinson swims sleeps picks fruit in sea forest and with"
WORDS = TEXT.split()
PLUS_TOKENS = 16
PLUS_LAYERS = 4  # the depth diffusers builds for every Plus adapter
# SD's schedule but for the prediction type: under v an untrained UNet keeps the latents near unit variance,
# under epsilon they grow twentyfold in ten steps and rounding with them.
NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}
HEAD_DIM = 64  # of the Plus resampler: diffusers takes the number of heads as inner width // 64


def tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer that has WORDS as single tokens and spells all else; limit 77."""
    symbols = sorted(ByteLevel.alphabet())
    symbols += [symbol + "</w>" for symbol in symbols]
    merges = dict.fromkeys(pair for word in WORDS for pair in _merges_of(word))
    tokens = [*symbols, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=77)


def _merges_of(word: str) -> list[tuple[str, str]]:
    ends = [*word[1:-1], word[-1] + "</w>"] if len(word) > 1 else []
    return [(word[: index + 1], end) for index, end in enumerate(ends)]


def text_config(width: int, projection: int) -> CLIPTextConfig:
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        initializer_factor=5.0,  # at these widths the library's default gives captions that hardly differ
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.18215,
    )


def sd15_unet() -> UNet2DConditionModel:
    """Like SD1.5's: attention on all levels but the lowest, one layer a block; seven attn2 layers."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def sdxl_unet() -> UNet2DConditionModel:
    """Like SDXL's: no attention on top, two layers a block, text_time embedding; eight attn2 layers."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 48,
    )


def image_encoder(width: int, projection: int) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        initializer_factor=5.0,  # see text_config
    )
    return CLIPVisionModelWithProjection(config)


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def write_sd15(folder: Path) -> Path:
    """A diffusers folder like SD1.5's with an image encoder of hidden width 40 and projection 24."""
    with _seed(15):
        pipeline = StableDiffusionPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config(32, 32)),
            tokenizer=tokenizer(),
            unet=sd15_unet(),
            scheduler=DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=image_processor(),
            image_encoder=image_encoder(40, 24),
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def write_sdxl(folder: Path) -> Path:
    """A diffusers folder like SDXL's with an image encoder of hidden width 48 and projection 40."""
    with _seed(100):
        pipeline = StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config(24, 24)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(40, 48)),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=sdxl_unet(),
            scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE),
            feature_extractor=image_processor(),
            image_encoder=image_encoder(48, 40),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, kind: str, path: Path, seed: int = 7) -> Path:
    """An IP-Adapter file (flat keys, as published) for the UNet and image encoder of `folder`."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    encoder = CLIPVisionConfig.from_pretrained(folder / "image_encoder")
    text_width = unet.config.cross_attention_dim
    with _seed(seed):
        if kind == "base":
            weights = base_projection(encoder.projection_dim, text_width)
        else:
            weights = plus_projection(encoder.hidden_size, text_width)
        weights = {f"image_proj.{name}": weight for name, weight in weights.items()}
        layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
        for index, name in enumerate(layers):
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                weights[f"ip_adapter.{2 * index + 1}.{part}.weight"] = _matrix(width, text_width)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return path


def base_projection(image_width: int, text_width: int, tokens: int = 4) -> dict[str, torch.Tensor]:
    return {
        "proj.weight": _matrix(tokens * text_width, image_width),
        "proj.bias": 0.1 * torch.randn(tokens * text_width),
        **_norm("norm", text_width),
    }


def plus_projection(image_width: int, text_width: int) -> dict[str, torch.Tensor]:
    weights = {
        "latents": torch.randn(1, PLUS_TOKENS, HEAD_DIM) / HEAD_DIM**0.5,
        "proj_in.weight": _matrix(HEAD_DIM, image_width),
        "proj_in.bias": 0.1 * torch.randn(HEAD_DIM),
        "proj_out.weight": _matrix(text_width, HEAD_DIM),
        "proj_out.bias": 0.1 * torch.randn(text_width),
        **_norm("norm_out", text_width),
    }
    for layer in range(PLUS_LAYERS):
        weights |= {
            **_norm(f"layers.{layer}.0.norm1", HEAD_DIM),
            **_norm(f"layers.{layer}.0.norm2", HEAD_DIM),
            f"layers.{layer}.0.to_q.weight": _matrix(HEAD_DIM, HEAD_DIM),
            f"layers.{layer}.0.to_kv.weight": _matrix(2 * HEAD_DIM, HEAD_DIM),
            f"layers.{layer}.0.to_out.weight": _matrix(HEAD_DIM, HEAD_DIM),
            **_norm(f"layers.{layer}.1.0", HEAD_DIM),
            f"layers.{layer}.1.1.weight": _matrix(4 * HEAD_DIM, HEAD_DIM),
            f"layers.{layer}.1.3.weight": _matrix(HEAD_DIM, 4 * HEAD_DIM),
        }
    return weights


def _matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) / columns**0.5


def _norm(name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": 1 + 0.1 * torch.randn(width), f"{name}.bias": 0.1 * torch.randn(width)}


@contextmanager
def _seed(seed: int) -> Iterator[None]:
    """Seeds torch inside a `with` block and leaves the generator outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
