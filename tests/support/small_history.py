"""Writes a small history encoder beside a small checkpoint: the real Blip classes, seeded random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastory import Story, StoryModel, generate
from fastory.checkpoints.history_encoder import HistoryConfig, HistoryEncoder
from fastory.events import Event, FrameDrawn

FRAME_TOKENS, POSITIONS = 12, 6


def config(width: int, vocabulary: int, local_heads: int = 4, bottleneck: int = 8) -> HistoryConfig:
    """A history of 12 tokens a frame and up to 6 frames, with every optional part unless told otherwise."""
    vision = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": 0.05,
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": FRAME_TOKENS,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "sep_token_id": None,
    }
    return HistoryConfig(vision, text, FRAME_TOKENS, POSITIONS, local_heads, bottleneck)


def encoder(config: HistoryConfig, seed: int = 0) -> HistoryEncoder:
    """Random weights, those included that training begins at zero."""
    torch.manual_seed(seed)
    made = HistoryEncoder(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.startswith(("adapter", "local_attention")) or "embeddings" in name.split(".")[0]:
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return made


def forget_adapter(folder: Path) -> None:
    """A model folder's own adapter of causal mode would take the place of another history."""
    file = folder / "fastory_defaults.json"
    if file.exists():
        defaults = json.loads(file.read_text())
        defaults.pop("adapter", None)
        file.write_text(json.dumps(defaults))


def write_causal_folder(base: Path, folder: Path, local_heads: int = 4, bottleneck: int = 8) -> Path:
    """A copy of the checkpoint `base` with a history encoder of its width and vocabulary."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("causal"))
    forget_adapter(folder)
    width = json.loads((base / "unet" / "config.json").read_text())["cross_attention_dim"]
    vocabulary = json.loads((base / "text_encoder" / "config.json").read_text())["vocab_size"]
    sizes = config(width, vocabulary, local_heads, bottleneck)
    (folder / "history").mkdir()
    (folder / "history" / "config.json").write_text(json.dumps(sizes.as_dict()))
    save_file(dict(encoder(sizes).state_dict()), folder / "history" / "model.safetensors")
    return folder


def tell(
    model: StoryModel, stories: Story | list[Story], output: Path | None = None, **options: Any
) -> Iterator[Event]:
    """Draw in causal mode, quickly: two steps, two stories at once unless told otherwise."""
    options = {"mode": "causal", "steps": 2, "batch_size": 2, **options}
    return generate(stories, model=model, output=output, **options)


def pictures(events: Iterator[Event]) -> dict[tuple[int, int], bytes]:
    """The bytes of every picture, by the story's place in the call and the frame."""
    return {(e.story_index, e.frame): e.image.tobytes() for e in events if isinstance(e, FrameDrawn)}
