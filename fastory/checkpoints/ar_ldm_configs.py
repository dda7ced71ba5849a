"""Configurations of the parts of an AR-LDM checkpoint, which holds none: from the shapes of its tensors.

Shapes tell widths, numbers of layers, vocabularies, the caption's length and the frames of history. They do not tell
attention heads, normalisation groups and activations: those are the ones of the models that AR-LDM was made from
(SD1.5, the text encoder of CLIP ViT-L, BLIP-large with BERT-base). Other ones are given by a diffusers folder, whose
configs are then used instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from fastory.checkpoints.history_encoder import HistoryConfig
from fastory.checkpoints.weights import read_json
from fastory.errors import InputError

VISION, MULTIMODAL = "mm_encoder.visual_encoder.", "mm_encoder.text_encoder."

# The noise schedule of SD1.5.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
# Layers of CLIP ViT-L's text encoder, of BLIP's two picture encoders and of BERT-base, by their width. Of a model of such
# a width fewer layers are a damaged one, which its shapes alone would not show.
TEXT_LAYERS, VISION_LAYERS, MULTIMODAL_LAYERS = {768: 12}, {768: 12, 1024: 24}, {768: 12}
SD15_CHANNELS = [320, 640, 1280, 1280]
SD15_BLOCKS = {
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of a checkpoint's tensors by name. A name that is not there is an InputError."""

    def __init__(self, tensors: Mapping[str, Any], path: Path) -> None:
        super().__init__({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        self.path = path

    def __missing__(self, name: str) -> NoReturn:
        raise InputError(
            f"{self.path}: the key {name} is missing, which tells a size of the model; the file is incomplete or of "
            "another model"
        )

    def count(self, name: str) -> int:
        """How many modules `name`.0, `name`.1, .. there are, by the highest number."""
        numbered = re.compile(rf"{re.escape(name)}\.(\d+)\.")
        found = [int(match[1]) for match in map(numbered.match, self) if match]
        return max(found) + 1 if found else self.__missing__(f"{name}.0.*")

    def has(self, prefix: str) -> bool:
        """Whether any name begins so."""
        return any(name.startswith(prefix) for name in self)


@dataclass(frozen=True)
class Configs:
    """Constructor arguments of the parts: of UNet2DConditionModel, AutoencoderKL, CLIPTextConfig and DDIMScheduler."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    history: HistoryConfig


def read_configs(shapes: Shapes, folder: Path | None) -> Configs:
    """The configurations of a checkpoint; those that `folder` has (unet/config.json, ...) are taken from there.

    Vocabularies, the caption's length and the frames of history are the checkpoint's own all the same: AR-LDM changes
    them. Raises InputError for a key that is missing, and for sizes that do not tell what the classes must know.
    """
    configs = {
        part: _config(folder, part) for part in ("unet", "vae", "text_encoder", "scheduler", "history")
    }
    vocabulary, caption = caption_sizes(shapes)
    text = configs["text_encoder"] or _text_config(shapes)
    history = _history_config_file(folder) if configs["history"] else _history_config(shapes)
    return Configs(
        unet=configs["unet"] or _unet_config(shapes),
        vae=configs["vae"] or _vae_config(shapes),
        text_encoder={**text, "vocab_size": vocabulary, "max_position_embeddings": caption},
        scheduler=configs["scheduler"] or SCHEDULE,
        history=replace(
            history,
            text={**history.text, **_multimodal_sizes(shapes, caption)},
            frame_tokens=caption,  # AR-LDM cuts both encoders' captions at the same length
            positions=shapes["time_embeddings.weight"][0],
            local_heads=0,
            bottleneck=0,
        ),
    )


def _config(folder: Path | None, part: str) -> dict[str, Any] | None:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = folder / part / name if folder is not None else None
    return read_json(path) if path is not None and path.is_file() else None


def _history_config_file(folder: Path | None) -> HistoryConfig:
    assert folder is not None
    path = folder / "history" / "config.json"
    return HistoryConfig.read(read_json(path), str(path))


def caption_sizes(shapes: Shapes) -> tuple[int, int]:
    """Vocabulary of the captions' encoder, and the length captions are cut at (77 in SD1.5; 85 or 91 in AR-LDM)."""
    embeddings = f"{text_prefix(shapes)}embeddings"
    length = shapes[f"{embeddings}.position_embedding.weight"][0]
    return shapes[f"{embeddings}.token_embedding.weight"][0], length


def text_prefix(names: Mapping[str, Any]) -> str:
    """What the names of the captions' encoder begin with: with or without the part that older transformers put in."""
    old = "text_encoder.text_model."
    return old if any(name.startswith(old) for name in names) else "text_encoder."


def _text_config(shapes: Shapes) -> dict[str, Any]:
    prefix = text_prefix(shapes)
    width = shapes[f"{prefix}embeddings.token_embedding.weight"][1]
    layers = shapes.count(f"{prefix}encoder.layers")
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "projection_dim": width,
        "num_hidden_layers": max(layers, TEXT_LAYERS.get(width, 0)),
        "num_attention_heads": _heads(shapes, width, "text_encoder"),
        "hidden_act": "quick_gelu",
    }


def _heads(shapes: Shapes, width: int, part: str) -> int:
    """CLIP ViT-L, BLIP and BERT have 64 channels a head at every width they were published in."""
    if width % 64:
        raise InputError(
            f"{shapes.path}: the attention heads of {part} cannot be told from its width {width}: the published models have "
            f"64 channels a head; give a folder with {part}/config.json by --config"
        )
    return width // 64


def _unet_config(shapes: Shapes) -> dict[str, Any]:
    down, up = (range(shapes.count(f"unet.{way}_blocks")) for way in ("down", "up"))
    channels = [shapes[f"unet.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in down]
    crossed_down, crossed_up = (
        ["CrossAttn" * shapes.has(f"unet.{way}_blocks.{i}.attentions.") for i in blocks]
        for way, blocks in (("down", down), ("up", up))
    )
    attention = "unet.mid_block.attentions.0"
    return {
        "in_channels": shapes["unet.conv_in.weight"][1],
        "out_channels": shapes["unet.conv_out.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": shapes.count("unet.down_blocks.0.resnets"),
        "down_block_types": [f"{crossed}DownBlock2D" for crossed in crossed_down],
        "up_block_types": [f"{crossed}UpBlock2D" for crossed in crossed_up],
        "cross_attention_dim": shapes[f"{attention}.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": len(shapes[f"{attention}.proj_in.weight"]) == 2,
        "attention_head_dim": 8,  # SD1.5's number of heads, the same at all its widths; diffusers' name is a misnomer
        "sample_size": 64,  # 512 pixels: SD1.5's, and what AR-LDM draws
        **(SD15_BLOCKS if channels == SD15_CHANNELS else {}),
    }


def _vae_config(shapes: Shapes) -> dict[str, Any]:
    blocks = range(shapes.count("vae.encoder.down_blocks"))
    return {
        "in_channels": shapes["vae.encoder.conv_in.weight"][1],
        "out_channels": shapes["vae.decoder.conv_out.weight"][0],
        "latent_channels": shapes["vae.decoder.conv_in.weight"][1],
        "block_out_channels": [
            shapes[f"vae.encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in blocks
        ],
        "layers_per_block": shapes.count("vae.encoder.down_blocks.0.resnets"),
        "down_block_types": ["DownEncoderBlock2D"] * len(blocks),
        "up_block_types": ["UpDecoderBlock2D"] * len(blocks),
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }


def _history_config(shapes: Shapes) -> HistoryConfig:
    return HistoryConfig(_vision_config(shapes), _multimodal_config(shapes), frame_tokens=1, positions=1)


def _vision_config(shapes: Shapes) -> dict[str, Any]:
    width, _, patch, _ = shapes[f"{VISION}patch_embed.proj.weight"]
    places = shapes[f"{VISION}pos_embed"][1] - 1  # one is the class token's
    side = math.isqrt(places)
    if side * side != places:
        raise InputError(
            f"{shapes.path}: {VISION}pos_embed has {places + 1} places; wanted a square of patches and 1"
        )
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{VISION}blocks.0.mlp.fc1.weight"][0],
        "num_hidden_layers": max(shapes.count(f"{VISION}blocks"), VISION_LAYERS.get(width, 0)),
        "num_attention_heads": _heads(shapes, width, "history"),
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,  # BLIP's; transformers' default is another
    }


def _multimodal_config(shapes: Shapes) -> dict[str, Any]:
    width = shapes[f"{MULTIMODAL}embeddings.word_embeddings.weight"][1]
    layer = f"{MULTIMODAL}encoder.layer.0"
    layers = shapes.count(f"{MULTIMODAL}encoder.layer")
    return {
        "hidden_size": width,
        "encoder_hidden_size": shapes[f"{layer}.crossattention.self.key.weight"][1],
        "intermediate_size": shapes[f"{layer}.intermediate.dense.weight"][0],
        "num_hidden_layers": max(layers, MULTIMODAL_LAYERS.get(width, 0)),
        "num_attention_heads": _heads(shapes, width, "history"),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }


def _multimodal_sizes(shapes: Shapes, caption: int) -> dict[str, Any]:
    """What AR-LDM changes in BLIP's text encoder: its vocabulary. Ids of special tokens are the tokenizer's."""
    vocabulary = shapes[f"{MULTIMODAL}embeddings.word_embeddings.weight"][0]
    positions = shapes[f"{MULTIMODAL}embeddings.position_embeddings.weight"][0]
    if positions < caption:
        raise InputError(
            f"{shapes.path}: captions have {caption} tokens, and the history's encoder places for {positions}"
        )
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"))
    return {"vocab_size": vocabulary, "max_position_embeddings": positions, **ids}
