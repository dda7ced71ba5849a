"""The folder that ships: diffusers layout, fp16 files, the IP-Adapter file, causal mode's adapter and fastory_defaults.json."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from fastory.builtin import WEIGHTS

CAUSAL = "causal/adapter.safetensors"  # what `fastory tune` made of the history stage's start
PARTS = (
    "causal",
    "feature_extractor",
    "image_encoder",
    "ip_adapter",
    "scheduler",
    "text_encoder",
    "tokenizer",
    "unet",
    "vae",
)
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": ["transformers", "CLIPImageProcessorPil"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
DEFAULTS = (
    "fastory_defaults.json"  # what a story is drawn with, chosen by measuring: the one that ships stays
)


def pack(model: Path, folder: Path) -> None:
    """Write `folder` anew from the training's model folder.

    Files are fp16; the CLIP configs say float32, because transformers takes the type from there and diffusers loads
    float32.
    """
    defaults = json.loads((WEIGHTS / DEFAULTS).read_text(encoding="utf-8"))
    shutil.rmtree(folder, ignore_errors=True)
    if not (model / CAUSAL).exists():
        del defaults["adapter"], defaults["causal"]  # not tuned yet: the model draws in iterative mode
    for part in PARTS:
        if part != "causal" or "adapter" in defaults:
            shutil.copytree(model / part, folder / part)
    if "adapter" in defaults:
        give_rows_to_new_words(folder / CAUSAL, CLIPTokenizer.from_pretrained(folder / "tokenizer"))
    for file in folder.rglob("*.safetensors"):
        metadata = metadata_of(file)
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata=metadata)
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # a path of the machine that trained
        if "dtype" in config:
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, content in (("model_index.json", INDEX), (DEFAULTS, defaults)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def give_rows_to_new_words(adapter: Path, tokenizer: CLIPTokenizer) -> None:
    """Let a history encoder that was tuned with fewer words read the tokenizer's: a new word is the mean of all others.

    It says nothing of what it stands for, and takes nothing from the words beside it.
    """
    key = "history.text.embeddings.word_embeddings.weight"
    tensors, metadata = load_file(adapter), metadata_of(adapter)
    missing = len(tokenizer) - len(tensors[key])
    if missing <= 0:
        return
    known = tensors[key].float()
    tensors[key] = torch.cat([known, known.mean(0, keepdim=True).expand(missing, -1)]).to(tensors[key].dtype)
    config = json.loads(metadata["history"])
    config["text"]["vocab_size"] = len(tokenizer)
    save_file(tensors, adapter, {**metadata, "history": json.dumps(config)})


def metadata_of(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {"format": "pt"}
