"""The networks of the built-in model: diffusers' and transformers' own classes at small sizes."""

from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from fastory.builtin.world.drawing import SIZE

WIDTH = 128  # of text states, image embeddings and the UNet's cross-attention
REFERENCE_TOKENS = 4
REFERENCE_SIZE = 96  # pixels a side of a picture before the image encoder
PATCH_SIZE = 12
LATENT_SIZE = SIZE // 8
LATENT_CHANNELS = 8

Network = Any
"""A network of diffusers or transformers: their lazy imports leave type checkers without its methods."""


@dataclass(frozen=True)
class Sizes:
    """Channels of the two convolutional networks; `large` still fits the 32 MB of weights and wants a GPU."""

    vae: tuple[int, ...] = (16, 32, 64, 96)
    unet: tuple[int, ...] = (64, 64, 128)


SMALL = Sizes()
LARGE = Sizes(vae=(24, 48, 80, 96), unet=(96, 128, 160))


def build_vae(sizes: Sizes = SMALL) -> Network:
    """The f8 autoencoder: (B, 3, 128, 128) in -1..1 to (B, 8, 16, 16) and back."""
    levels = len(sizes.vae)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def build_text_encoder(vocabulary_size: int, token_limit: int) -> Network:
    """Captions of up to token_limit tokens to (B, token_limit, 128). The last three ids are pad, start and end."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=token_limit,
            bos_token_id=vocabulary_size - 2,
            eos_token_id=vocabulary_size - 1,
            pad_token_id=vocabulary_size - 1,
        )
    )


def build_image_encoder() -> Network:
    """Pictures (B, 3, 96, 96), normalised by the feature extractor, to image_embeds (B, 128)."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=REFERENCE_SIZE,
            patch_size=PATCH_SIZE,
        )
    )


def build_unet(sizes: Sizes = SMALL) -> Network:
    """The denoiser on (B, 8, 16, 16), cross-attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=sizes.unet,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 2, 4),
        norm_num_groups=16,
    )


def build_scheduler() -> Network:
    """Stable Diffusion's noise schedule, rescaled so that its last timestep is noise alone; the networks predict v.

    Lin et al., arXiv 2305.08891, sections 3.1 and 3.3: as it was, the last timestep still told a picture's colours, so that
    the network read them from the noise that a run begins with, whatever the caption said.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
