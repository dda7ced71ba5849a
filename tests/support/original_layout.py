"""Writes a diffusers folder as one file with the original key names, as SD1.5 and SDXL checkpoints are handed around."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_PARTS = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "downsamplers.0.conv": "downsample.conv",
    "upsamplers.0.conv": "upsample.conv",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_PARTS = {
    "encoder.layers": "transformer.resblocks",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def write_single_file(folder: Path, path: Path) -> Path:
    """One .safetensors file with the weights of a folder written by small_checkpoints."""
    if (folder / "text_encoder_2").is_dir():
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
        weights = _prefixed("conditioner.embedders.0.transformer.text_model.", _clip(pipeline.text_encoder))
        weights |= _prefixed("conditioner.embedders.1.model.", _open_clip(pipeline.text_encoder_2))
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        weights = _prefixed("cond_stage_model.transformer.text_model.", _clip(pipeline.text_encoder))
    weights |= _prefixed("model.diffusion_model.", _unet(pipeline.unet))
    weights |= _prefixed("first_stage_model.", _vae(pipeline.vae))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    return path


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: weight for name, weight in weights.items()}


def _clip(encoder: torch.nn.Module) -> Weights:
    """The text model's own names, which the original checkpoints share; some releases wrap it in text_model."""
    return {name.removeprefix("text_model."): weight for name, weight in encoder.state_dict().items()}


def _unet(unet: torch.nn.Module) -> Weights:
    layers = unet.config.layers_per_block

    def block(match: re.Match[str]) -> str:
        """Blocks are numbered through, and a block's resnet, attention and resampler stand side by side in it."""
        side, level, kind, index = match[1], int(match[2]), match[3], int(match[4])
        first = level * (layers + 1) + (1 if side == "down" else 0)
        name = "input_blocks" if side == "down" else "output_blocks"
        if kind == "downsamplers":
            return f"{name}.{first + layers}.0.op"
        if kind == "upsamplers":
            behind_attention = hasattr(unet.up_blocks[level], "attentions")
            return f"{name}.{first + layers}.{2 if behind_attention else 1}.conv"
        return f"{name}.{first + index}.{0 if kind == 'resnets' else 1}"

    def renamed(name: str) -> str:
        if ".resnets." in name:
            name = _replaced(name, RESNET)
        name = re.sub(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)(?:(?<=samplers\.0)\.conv)?", block, name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"middle_block.{2 * int(match[1])}", name)
        return _replaced(name.replace("mid_block.attentions.0", "middle_block.1"), UNET_ENDS, "^")

    return {renamed(name): weight for name, weight in unet.state_dict().items()}


def _vae(vae: torch.nn.Module) -> Weights:
    levels = len(vae.config.block_out_channels)

    def renamed(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        return _replaced(re.sub(r"up\.(\d)\.resnets", r"up.\1.block", name), VAE_PARTS)

    weights = {renamed(name): weight for name, weight in vae.state_dict().items()}
    # The original attention is written with 1x1 convolutions.
    is_product = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
    return {
        name: weight[:, :, None, None] if is_product.search(name) else weight
        for name, weight in weights.items()
    }


def _open_clip(encoder: torch.nn.Module) -> Weights:
    weights = {_replaced(name, OPEN_CLIP_PARTS): weight for name, weight in _clip(encoder).items()}
    weights["text_projection"] = weights.pop("text_projection.weight").T
    for query in [name for name in weights if ".q_proj." in name]:
        parts = [weights.pop(query.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        weights[re.sub(r"q_proj\.", "in_proj_", query)] = torch.cat(parts)
    return weights


def _replaced(name: str, parts: Mapping[str, str], start: str = r"(?:^|(?<=\.))") -> str:
    """The name with each whole dotted part found in `parts` replaced."""
    replacement: Callable[[re.Match[str]], str] = lambda match: parts[match[0]]  # noqa: E731
    return re.sub(start + "(?:" + "|".join(map(re.escape, parts)) + r")(?=\.|$)", replacement, name)
