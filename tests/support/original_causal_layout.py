"""Writes small AR-LDM / Causal-Story training checkpoints from key names and shapes, random weights, as Lightning saves.

Widths are multiples of 64, the channels of a head in every published encoder, with more than one head each; those of the
three encoders that could be mixed up differ where the model allows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from small_checkpoints import WORDS, tokenizer
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer

TEXT, VISION, LAYERS = 128, 192, 2
TEXT_MLP, VISION_MLP = 160, 224
SIDE, PATCH = 32, 8
FRAMES = 5  # time embeddings
NAMES = ["pororo", "loopy", "crong"]
# BLIP puts [DEC] and [ENC] behind BERT's vocabulary, training the characters' names behind those.
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def caption_tokenizer() -> CLIPTokenizer:
    words = tokenizer()
    words.add_tokens(NAMES)
    return words


def bert_tokenizer(names: list[str] | None = None) -> BertTokenizer:
    words = BertTokenizer(vocab={word: index for index, word in enumerate(BERT_WORDS)})
    words.add_special_tokens({"bos_token": "[DEC]"})
    words.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    words.add_tokens(NAMES if names is None else names)
    return words


def write_config(folder: Path) -> Path:
    """What the checkpoint lacks: both tokenizers."""
    caption_tokenizer().save_pretrained(folder / "tokenizer")
    bert_tokenizer().save_pretrained(folder / "blip_tokenizer")
    return folder


def write_checkpoint(path: Path, weights: dict[str, Tensor]) -> Path:
    """A Lightning file: the weights, and beside them what training left."""
    step = {"step": torch.tensor(7.0), "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}
    contents: dict[str, Any] = {
        "epoch": 49,
        "global_step": 1000,
        "pytorch-lightning_version": "1.6.4",
        "state_dict": weights,
        "optimizer_states": [{"state": {0: step}, "param_groups": [{"lr": 1e-5, "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 49, "_last_lr": [1e-5]}],
        "callbacks": {"ModelCheckpoint": {"best_model_path": "/home/someone/last.ckpt"}},
    }
    torch.save(contents, path)
    return path


def weights(caption_length: int = 85, *, convolutions: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """The state_dict. convolutions: the VAE's attention as 1x1 convolutions, as before diffusers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            **{f"unet.{name}": tensor for name, tensor in unet().state_dict().items()},
            **vae_weights(convolutions),
            **clip_weights(caption_length),
            **vision_weights(),
            **bert_weights(),
            "modal_type_embeddings.weight": torch.randn(2, TEXT),
            "time_embeddings.weight": torch.randn(FRAMES, TEXT),
            "caption_null_token": torch.zeros(1, caption_length, dtype=torch.long),
            "picture_null_token": torch.zeros(1, 3, SIDE, SIDE),
            "inception.Conv2d_1a_3x3.conv.weight": torch.randn(4, 3, 3, 3),
            "inception.Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0),
        }


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
    )


def vae_weights(convolutions: bool) -> dict[str, Tensor]:
    channels = (32, 32, 64, 64)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
    )
    given = {f"vae.{name}": tensor for name, tensor in vae.state_dict().items() if ".attentions." not in name}
    for half in ("encoder", "decoder"):
        attention = f"vae.{half}.mid_block.attentions.0"
        given |= norm(f"{attention}.group_norm", channels[-1])
        for name in ("query", "key", "value", "proj_attn"):
            given |= linear(f"{attention}.{name}", channels[-1], channels[-1])
            if convolutions:
                given[f"{attention}.{name}.weight"] = given[f"{attention}.{name}.weight"][:, :, None, None]
    return given


def clip_weights(caption_length: int) -> dict[str, Tensor]:
    prefix = "text_encoder.text_model"
    given = {
        f"{prefix}.embeddings.position_ids": torch.arange(caption_length)[None],
        f"{prefix}.embeddings.token_embedding.weight": torch.randn(len(caption_tokenizer()), TEXT),
        f"{prefix}.embeddings.position_embedding.weight": torch.randn(caption_length, TEXT),
        **norm(f"{prefix}.final_layer_norm", TEXT),
    }
    for n in range(LAYERS):
        layer = f"{prefix}.encoder.layers.{n}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            given |= linear(f"{layer}.self_attn.{name}", TEXT, TEXT)
        given |= linear(f"{layer}.mlp.fc1", TEXT_MLP, TEXT) | linear(f"{layer}.mlp.fc2", TEXT, TEXT_MLP)
        given |= norm(f"{layer}.layer_norm1", TEXT) | norm(f"{layer}.layer_norm2", TEXT)
    return given


def vision_weights() -> dict[str, Tensor]:
    prefix = "mm_encoder.visual_encoder"
    given = {
        f"{prefix}.cls_token": torch.randn(1, 1, VISION),
        f"{prefix}.pos_embed": torch.randn(1, (SIDE // PATCH) ** 2 + 1, VISION),
        f"{prefix}.patch_embed.proj.weight": torch.randn(VISION, 3, PATCH, PATCH) / PATCH,
        f"{prefix}.patch_embed.proj.bias": torch.randn(VISION),
        **norm(f"{prefix}.norm", VISION),
    }
    for n in range(LAYERS):
        block = f"{prefix}.blocks.{n}"
        given |= norm(f"{block}.norm1", VISION) | norm(f"{block}.norm2", VISION)
        given |= linear(f"{block}.attn.qkv", 3 * VISION, VISION) | linear(
            f"{block}.attn.proj", VISION, VISION
        )
        given |= linear(f"{block}.mlp.fc1", VISION_MLP, VISION) | linear(
            f"{block}.mlp.fc2", VISION, VISION_MLP
        )
    return given


def bert_weights() -> dict[str, Tensor]:
    prefix = "mm_encoder.text_encoder"
    given = {
        f"{prefix}.embeddings.position_ids": torch.arange(128)[None],
        f"{prefix}.embeddings.word_embeddings.weight": torch.randn(len(bert_tokenizer()), TEXT),
        f"{prefix}.embeddings.position_embeddings.weight": torch.randn(128, TEXT),
        **norm(f"{prefix}.embeddings.LayerNorm", TEXT),
    }
    for n in range(LAYERS):
        layer = f"{prefix}.encoder.layer.{n}"
        for kind, width in (("attention", TEXT), ("crossattention", VISION)):
            given |= linear(f"{layer}.{kind}.self.query", TEXT, TEXT)
            given |= linear(f"{layer}.{kind}.self.key", TEXT, width)
            given |= linear(f"{layer}.{kind}.self.value", TEXT, width)
            given |= linear(f"{layer}.{kind}.output.dense", TEXT, TEXT)
            given |= norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        given |= linear(f"{layer}.intermediate.dense", TEXT_MLP, TEXT)
        given |= linear(f"{layer}.output.dense", TEXT, TEXT_MLP) | norm(f"{layer}.output.LayerNorm", TEXT)
    return given


def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
    weight = torch.randn(rows, columns) / columns**0.5
    return {f"{name}.weight": weight, f"{name}.bias": 0.1 * torch.randn(rows)}


def norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + 0.1 * torch.randn(width), f"{name}.bias": 0.1 * torch.randn(width)}
