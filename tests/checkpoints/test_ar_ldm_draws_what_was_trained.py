"""A converted folder is complete in itself: sizes read right, both tokenizers, AR-LDM's settings, and it draws."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hub_cache import cached
from huggingface_hub import constants
from original_causal_layout import (
    BERT_WORDS,
    NAMES,
    bert_tokenizer,
    caption_tokenizer,
    weights,
    write_checkpoint,
    write_config,
)
from torch import Tensor
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel
from typer.testing import CliRunner

from fastory import InputError, StoryModel
from fastory.checkpoints import convert_checkpoint
from fastory.checkpoints.ar_ldm import convert_ar_ldm, original_names
from fastory.checkpoints.ar_ldm_configs import Shapes, read_configs
from fastory.checkpoints.history_encoder import HistoryConfig, HistoryEncoder
from fastory.cli import app

# SD1.5, CLIP ViT-L and BLIP-large as published; vocabularies and caption length of the Flintstones checkpoint.
UNET = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}
CLIP = {
    "vocab_size": 49412,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 91,
    "hidden_act": "quick_gelu",
}
BLIP_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}
BLIP_TEXT = {
    "vocab_size": 30525,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


def made(folder: Path, caption_length: int = 85, name: str = "story.ckpt", **changes: Tensor) -> Path:
    """A checkpoint and the folder with its tokenizers, beside each other."""
    write_config(folder / "config")
    return write_checkpoint(folder / name, weights(caption_length) | changes)


@pytest.mark.parametrize("caption_length", [85, 91])
def test_two_frames_are_drawn(tmp_path: Path, caption_length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, caption_length, "flintstones.ckpt")
    run = CliRunner().invoke(app, ["convert", "flintstones.ckpt", "model", "--config", "config", "--offline"])
    assert run.exit_code == 0, run.output
    assert run.stdout.strip() == "model"
    shutil.rmtree("config")
    Path("flintstones.ckpt").unlink()
    Path("model").rename("elsewhere")
    Path("story.txt").write_text("pororo swims in the sea\nloopy and pororo sleeps in the forest\n")
    # AR-LDM's settings come with the folder, the mode among them.
    options = ["--model", "elsewhere", "--steps", "2", "--width", "64", "--height", "64", "--offline"]
    run = CliRunner().invoke(app, ["generate", "story.txt", *options, "--output", "run"])
    assert run.exit_code == 0, run.output
    assert len(list(Path("run/frames").glob("*.png"))) == 2
    settings = json.loads(Path("run/manifest.json").read_text())["settings"]
    assert (settings["mode"], settings["window"], settings["guidance_scale"]) == ("causal", "all", 6.0)
    assert settings["scheduler"] == "ddim"
    model = StoryModel.open("elsewhere", offline=True)
    assert model.defaults["steps"] == 250
    assert model.require_history().encoder.config.frame_tokens == caption_length
    assert model.pipeline.tokenizer.model_max_length == caption_length
    assert model.encode_caption("a fox").tokens.shape[1] == caption_length
    assert model.pipeline.tokenizer.tokenize(NAMES[0]) == [NAMES[0]]
    assert model.require_history().tokenizer.tokenize(NAMES[0]) == [NAMES[0]]


def test_the_folder_holds_the_models_name_and_no_other_place(tmp_path: Path) -> None:
    folder = convert_checkpoint(made(tmp_path), tmp_path / "model", config=tmp_path / "config")
    assert json.loads((folder / "model_index.json").read_text())["_name_or_path"] == "story"
    # Of the user's own folders, and of the one that training named in its checkpoint.
    for file in folder.rglob("*"):
        if file.is_file():
            assert not re.search(rf"{tmp_path.parent.name}|/home/".encode(), file.read_bytes()), file
    names = {path.name for path in folder.iterdir()}
    parts = {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "history"}
    assert names == parts | {"model_index.json", "fastory_defaults.json", "fastory_converted.json"}


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """The published models without memory."""
    blip = HistoryConfig(BLIP_VISION, BLIP_TEXT, frame_tokens=91, positions=5)
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(**UNET),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP)),
            "history": HistoryEncoder(blip),
        }


@pytest.fixture(scope="module")
def published(parts: dict[str, Any]) -> dict[str, Tensor]:
    """Their tensors under a checkpoint's names."""
    return {
        original_names(part, name)[0]: tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_published_sizes_give_the_published_configs(
    parts: dict[str, Any], published: dict[str, Tensor]
) -> None:
    configs = read_configs(Shapes(published, Path("x.ckpt")), None)
    for part, given in (("unet", configs.unet), ("vae", configs.vae)):
        with torch.device("meta"):
            ours = dict(type(parts[part]).from_config(dict(given)).config)
        differ = {name for name, value in parts[part].config.items() if listed(ours[name]) != listed(value)}
        assert differ <= {"sample_size", "_use_default_values"}
    assert (configs.unet["sample_size"], configs.vae["scaling_factor"]) == (64, 0.18215)
    assert configs.text_encoder == CLIP
    assert configs.history.vision == BLIP_VISION
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"))
    assert configs.history.text == BLIP_TEXT | ids
    assert (configs.history.frame_tokens, configs.history.positions) == (91, 5)


@pytest.mark.parametrize(
    "lost",
    [
        "mm_encoder.visual_encoder.blocks.23.",
        "mm_encoder.text_encoder.encoder.layer.11.",
        "text_encoder.text_model.encoder.layers.11.",
        "unet.down_blocks.2.attentions.",
        "unet.down_blocks.0.resnets.1.",
    ],
)
def test_a_last_layer_that_is_lost_is_missed(published: dict[str, Tensor], tmp_path: Path, lost: str) -> None:
    """Shapes alone would tell a smaller model; at the published widths there is none."""
    left = {name: tensor for name, tensor in published.items() if not name.startswith(lost)}
    checkpoint = tmp_path / "x.ckpt"
    checkpoint.touch()
    with pytest.raises(InputError, match=rf"{len(published) - len(left)} keys are missing \({lost}"):
        convert_ar_ldm(checkpoint, left, tmp_path / "model")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_heads_that_no_width_tells_are_asked_for(tmp_path: Path) -> None:
    """A width that is no multiple of 64 has no published number of heads; --config gives it."""
    given = weights()
    narrow = {}
    for name, tensor in given.items():
        if name.startswith("mm_encoder.visual_encoder.") or ".crossattention.self." in name:
            # 192 -> 96, and 3 * 192 -> 3 * 96
            half = [slice(side // 2) if side in (192, 576) else slice(None) for side in tensor.shape]
            tensor = tensor[tuple(half)].clone()
        narrow[name] = tensor
    checkpoint = write_checkpoint(tmp_path / "story.ckpt", narrow)
    config = write_config(tmp_path / "config")
    with pytest.raises(
        InputError, match=r"heads of history cannot be told from its width 96.*history/config"
    ):
        convert_checkpoint(checkpoint, tmp_path / "model", config=config)
    vision = {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 6}
    vision |= {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
    text = {"hidden_size": 128, "encoder_hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
    sizes = HistoryConfig(vision, {**text, "num_attention_heads": 4}, 1, 1, 4, 8)
    (config / "history").mkdir()
    (config / "history" / "config.json").write_text(json.dumps(sizes.as_dict()))
    history = StoryModel.open(
        str(convert_checkpoint(checkpoint, tmp_path / "model", config=config))
    ).require_history()
    read = history.encoder.config
    assert (read.vision["num_attention_heads"], read.text["num_attention_heads"]) == (6, 4)
    # What the checkpoint has goes before what the folder says.
    assert (read.frame_tokens, read.positions, read.local_heads, read.bottleneck) == (85, 5, 0, 0)


def test_configs_of_a_diffusers_folder_are_used(tmp_path: Path, sd15_folder: Path) -> None:
    """Those of its parts that it has; vocabulary and caption length stay the checkpoint's."""
    checkpoint, config = made(tmp_path), tmp_path / "config"
    shutil.copytree(sd15_folder / "scheduler", config / "scheduler")
    first = convert_checkpoint(checkpoint, tmp_path / "first", config=config)
    for part in ("unet", "text_encoder"):
        (config / part).mkdir()
        values = json.loads((first / part / "config.json").read_text())
        values |= (
            {"attention_head_dim": 4} if part == "unet" else {"vocab_size": 49408, "num_attention_heads": 4}
        )
        values |= {} if part == "unet" else {"max_position_embeddings": 77}
        (config / part / "config.json").write_text(json.dumps(values))
    model = StoryModel.open(str(convert_checkpoint(checkpoint, tmp_path / "second", config=config)))
    assert model.unet.config.attention_head_dim == 4
    assert model.pipeline.text_encoder.config.num_attention_heads == 4
    assert model.pipeline.text_encoder.config.max_position_embeddings == 85
    assert model.pipeline.scheduler.config.prediction_type == "v_prediction"


def test_without_folders_the_published_tokenizers_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache; [DEC] and [ENC] are added to BERT's in BLIP's order."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    words, bert = len(caption_tokenizer()) - len(NAMES), len(bert_tokenizer([]))
    given = weights()
    for name, rows in (
        ("text_encoder.text_model.embeddings.token_embedding.weight", words),
        ("mm_encoder.text_encoder.embeddings.word_embeddings.weight", bert),
    ):
        given[name] = given[name][:rows].clone()
    checkpoint = write_checkpoint(tmp_path / "story.ckpt", given)
    with pytest.raises(InputError, match=r"folder with tokenizer/ by --config.*--offline"):
        convert_checkpoint(checkpoint, tmp_path / "model", offline=True)
    from small_checkpoints import tokenizer

    tokenizer().save_pretrained(cached(tmp_path / "hub", "openai/clip-vit-large-patch14"))
    with pytest.raises(InputError, match=r"folder with blip_tokenizer/ by --config.*--offline"):
        convert_checkpoint(checkpoint, tmp_path / "model", offline=True)
    assert not (tmp_path / "model").exists()
    plain = BertTokenizer(vocab={word: index for index, word in enumerate(BERT_WORDS)})
    plain.save_pretrained(cached(tmp_path / "hub", "google-bert/bert-base-uncased"))
    model = StoryModel.open(str(convert_checkpoint(checkpoint, tmp_path / "model", offline=True)))
    vocabulary = model.require_history().tokenizer.get_vocab()
    assert (vocabulary["[DEC]"], vocabulary["[ENC]"]) == (len(BERT_WORDS), len(BERT_WORDS) + 1)
