"""A small random CLIP model with a tokenizer and a picture preparation, as transformers saves them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel


def write_clip(folder: Path, tokenizer: Path) -> Path:
    """tokenizer: the folder of one, whose vocabulary the text part gets."""
    from transformers import CLIPTokenizer

    vocabulary = len(CLIPTokenizer.from_pretrained(tokenizer))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {
        name: CLIPTokenizer.from_pretrained(tokenizer).eos_token_id
        for name in ("eos_token_id", "pad_token_id")
    }
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": vocabulary, "max_position_embeddings": 40, **ids},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder
