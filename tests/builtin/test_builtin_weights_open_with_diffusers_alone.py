"""The shipped folder must be an ordinary Stable Diffusion folder: no fastory, no pickle, no path of a machine, small."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastory.builtin import WEIGHTS

DRAW = """
import sys
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

folder = sys.argv[1]
pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
pipeline.set_progress_bar_config(disable=True)

def draw(**references):
    generator = torch.Generator().manual_seed(0)
    options = dict(num_inference_steps=1, guidance_scale=3.0, generator=generator, output_type="np")
    return pipeline("a fox is jumping in the snow", **options, **references).images[0]

plain = draw()
pipeline.load_ip_adapter(folder, subfolder="ip_adapter", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
pipeline.set_ip_adapter_scale(0.5)
dark, light = (np.full_like(plain, value) for value in (0.1, 0.9))
pictures = [plain] + [draw(ip_adapter_image=[pipeline.numpy_to_pil(p[None])]) for p in (dark, light)]
assert all(np.isfinite(p).all() and p.std() > 0.02 for p in pictures), "a picture is empty"
assert not np.allclose(pictures[1], pictures[2]), "references change nothing"
assert "fastory" not in sys.modules
print(plain.shape)
"""


def test_draws_with_and_without_references(tmp_path: Path) -> None:
    """Run beside the checkout, so that no module of ours is at hand by accident."""
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(WEIGHTS)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    defaults = json.loads((WEIGHTS / "fastory_defaults.json").read_text())
    assert done.stdout.strip() == f"({defaults['height']}, {defaults['width']}, 3)"


def test_weights_stay_within_the_size_of_the_wheel() -> None:
    sizes = [file.stat().st_size for file in WEIGHTS.parent.rglob("*") if file.is_file()]
    assert max(sizes) <= 20e6
    assert sum(sizes) <= 32e6


def test_weights_are_safetensors_and_json_only() -> None:
    kinds = {file.suffix for file in WEIGHTS.rglob("*") if file.is_file()}
    assert kinds == {".safetensors", ".json"}


@pytest.mark.parametrize(
    "file", sorted(WEIGHTS.rglob("*.json")), ids=lambda file: str(file.relative_to(WEIGHTS))
)
def test_no_config_holds_a_path_of_the_machine_that_trained(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if file.parent.name == "tokenizer" and file.name == "tokenizer.json":
        text = text[:2000]  # the vocabulary holds "/" as a token
    # a value that begins as a path from the root does
    absolute = re.compile(r'"(?:/[\w.-]+){2,}|"[A-Za-z]:\\')
    assert absolute.search('{"_name_or_path": "/home/ann/unet"}')
    assert not absolute.search(text)


@pytest.mark.parametrize("name", ["text_encoder", "image_encoder"])
def test_clip_configs_say_float32(name: str) -> None:
    """transformers takes the type from the config, diffusers loads float32: fp16 there would mix types."""
    assert json.loads((WEIGHTS / name / "config.json").read_text())["dtype"] == "float32"
