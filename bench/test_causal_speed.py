"""How long a frame of a causal story takes at t = 10 and at t = 100: the window is full at both, so as long."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import results
import torch
from safetensors.torch import save_file

from fastory import Story, StoryModel, generate
from fastory.checkpoints.history_encoder import HistoryConfig, HistoryEncoder
from fastory.events import FrameDrawn

WINDOW, FRAMES, AROUND = 4, 106, 5
CAPTION = "a fox is sleeping in the snow"


def write_adapter(model: StoryModel, file: Path) -> Path:
    """Untrained history weights for `model`: the time does not depend on their values."""
    width = model.cross_attention_dim
    small = {"intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": width, "image_size": 96, "patch_size": 12, **small}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "sep_token_id": None}
    text = {
        "vocab_size": len(model.pipeline.tokenizer),
        "hidden_size": width,
        "encoder_hidden_size": width,
        "max_position_embeddings": 16,
        **small,
        **tokens,
    }
    config = HistoryConfig(vision, text, frame_tokens=16, positions=WINDOW, local_heads=4, bottleneck=32)
    torch.manual_seed(0)
    tensors = {f"history.{name}": tensor for name, tensor in HistoryEncoder(config).state_dict().items()}
    save_file(tensors, file, {"history": json.dumps(config.as_dict())})
    return file


def measure(adapter: Path, device: str) -> dict[str, Any]:
    """One story of 106 frames, window 4, 5 steps: milliseconds a frame around t = 10 and t = 100 (p20, p50, p80)."""
    model = StoryModel.open("builtin", device=device, adapter=str(adapter))
    seconds: list[float] = []
    before = time.perf_counter()
    story = Story.from_captions([CAPTION] * FRAMES)
    for event in generate(story, model=model, mode="causal", window=WINDOW, steps=5, guidance_scale=3.0):
        if isinstance(event, FrameDrawn):
            now = time.perf_counter()
            seconds.append(now - before)
            before = now
    found: dict[str, Any] = {"window": WINDOW, "steps": 5, "dtype": model.placement.dtype_name}
    for t in (10, 100):
        p20, _, _, p80 = statistics.quantiles(seconds[t - AROUND : t + AROUND + 1], n=5)
        p50 = statistics.median(seconds[t - AROUND : t + AROUND + 1])
        found[f"frame_{t}_ms"] = {"p20": p20 * 1e3, "p50": p50 * 1e3, "p80": p80 * 1e3}
    found["ratio"] = found["frame_100_ms"]["p50"] / found["frame_10_ms"]["p50"]
    return found


def test_frame(benchmark: Any, device: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The ratio of the two medians; within 5 % is what the method promises."""
    if request.config.getoption("--compare"):
        pytest.skip("--compare measures the kernels alone")
    with torch.no_grad():
        adapter = write_adapter(StoryModel.open("builtin", device=device), tmp_path / "history.safetensors")
    found = benchmark.pedantic(lambda: measure(adapter, device), rounds=1, iterations=1)
    benchmark.extra_info.update(found)
    print(json.dumps(found))
    if request.config.getoption("--save"):
        file = results.FOLDER / f"causal-{device}.json"
        file.parent.mkdir(exist_ok=True)
        record = {"kind": "measured", "environment": results.environment(device), **found}
        file.write_text(json.dumps(record, indent=1) + "\n")
