"""A frame that is black or not finite never reaches the other frames; the user is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from drawn_rounds import CAPTIONS, draw, settings
from PIL import Image
from safetensors.torch import load_file, save_file
from small_history import write_causal_folder
from transformers import CLIPConfig

from fastory import Story, StoryModel, generate
from fastory.errors import FastoryError
from fastory.events import FrameDrawn
from fastory.modes.iterative import iterative
from fastory.modes.mode import StoryPlan


class Kept:
    """Round 0 as it was, with one frame left out."""

    def __init__(self, pictures: dict[tuple[int, int], Image.Image], left_out: int) -> None:
        self.pictures, self.left_out = pictures, left_out

    def has(self, round: int, frame: int) -> bool:
        return (round, frame) in self.pictures

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        return self.pictures[round, frame], "blacked out" if frame == self.left_out else None


def test_left_out_picture_has_no_influence(sd15_folder: Path, sd15_adapter_plus: Path) -> None:
    model = StoryModel.open(str(sd15_folder), ip_adapter=str(sd15_adapter_plus))
    story = Story.from_captions(CAPTIONS)
    round_0 = draw(model, CAPTIONS, settings(iterations=0), 2)
    black = {**round_0, (0, 2): Image.new("RGB", round_0[0, 2].size)}
    results = []
    for pictures, left_out in [(round_0, 2), (black, 2), (round_0, -1)]:
        plan = StoryPlan(story, settings(iterations=1), finished=Kept(pictures, left_out))
        events = iterative(model, plan, batch_sizes=[2])
        results.append([event.image.tobytes() for event in events if isinstance(event, FrameDrawn)])
    assert results[0] == results[1]
    assert results[0] != results[2]  # as a reference it would have counted


@pytest.fixture
def broken_decoder(sd15_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint whose VAE decodes to NaN, as an overflow in fp16 does."""
    folder = tmp_path / "broken"
    shutil.copytree(sd15_folder, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"] = torch.full_like(weights["decoder.conv_out.bias"], float("nan"))
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.fixture
def one_broken_word(sd15_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that draws NaN for a caption with one word of the first caption alone."""
    folder = tmp_path / "word"
    shutil.copytree(sd15_folder, folder)
    pipeline = StoryModel.open(str(folder)).pipeline
    word = pipeline.tokenizer("rabbit", add_special_tokens=False).input_ids[0]
    assert [word in pipeline.tokenizer(caption).input_ids for caption in CAPTIONS[:2]] == [True, False]
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    (name,) = [name for name in weights if name.endswith("token_embedding.weight")]
    weights[name][word] = float("nan")
    save_file(weights, file, {"format": "pt"})
    return folder


def test_a_non_finite_frame_is_reported_and_the_story_goes_on(
    one_broken_word: Path, sd15_adapter_base: Path, tmp_path: Path
) -> None:
    model = StoryModel.open(str(one_broken_word), ip_adapter=str(sd15_adapter_base))
    story = Story.from_captions(CAPTIONS[:2])
    events = list(generate(story, model=model, steps=2, iterations=1, output=tmp_path / "run"))
    drawn = [event for event in events if isinstance(event, FrameDrawn)]
    assert [event.left_out for event in drawn] == ["holds non-finite values", None] * 2
    assert drawn[0].image.getextrema() == ((0, 0),) * 3
    assert (tmp_path / "run" / "storybook.html").exists()
    # taken up again, it is still left out
    again = list(generate(story, model=model, steps=2, iterations=1, output=tmp_path / "run"))
    assert not [event for event in again if isinstance(event, FrameDrawn)]


@pytest.mark.parametrize("mode", ["iterative", "causal"])
def test_a_story_of_non_finite_frames_alone_fails_and_keeps_its_folder(
    broken_decoder: Path, sd15_adapter_base: Path, tmp_path: Path, mode: str
) -> None:
    """It ended with exit code 0. In iterative mode no later round is drawn from nothing."""
    if mode == "causal":
        broken_decoder = write_causal_folder(broken_decoder, tmp_path / "causal")
    model = StoryModel.open(str(broken_decoder), ip_adapter=str(sd15_adapter_base))
    options = {"model": model, "steps": 1, "mode": mode, "output": tmp_path / "run"}
    story, drawn = Story.from_captions(CAPTIONS[:2]), 0
    for wanted in (2, 0):  # the same command again says the same at once
        with pytest.raises(
            FastoryError, match=r"no picture of round 0 has finite values.*--overwrite"
        ) as raised:
            for event in generate(story, **options):  # type: ignore[arg-type]
                drawn += isinstance(event, FrameDrawn)
        assert drawn == wanted and raised.value.exit_code == 1 and "\n" not in str(raised.value)
        drawn = 0
    assert len(list((tmp_path / "run" / "iteration-00").glob("*.png"))) == 2
    assert not (tmp_path / "run" / "iteration-01").exists()
    with pytest.raises(FastoryError, match="no picture of round 0"):  # without a folder, too
        list(generate(story, model=model, steps=1, mode=mode))


def test_what_a_safety_checker_blacks_out_is_left_out(sd15_folder: Path, sd15_adapter_base: Path) -> None:
    model = StoryModel.open(str(sd15_folder), ip_adapter=str(sd15_adapter_base))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    side = model.checkpoint.image_encoder.config.image_size  # type: ignore[union-attr]
    vision = {**small, "image_size": side, "patch_size": side // 2}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=small, vision_config=vision, projection_dim=8)
    ).eval()
    checker.concept_embeds_weights.data.fill_(-2.0)  # a cosine is always above it: every picture is refused
    model.pipeline.register_modules(
        safety_checker=checker, feature_extractor=model.checkpoint.image_processor
    )
    story = Story.from_captions(CAPTIONS[:2])
    refused = [e for e in generate(story, model=model, steps=1, iterations=1) if isinstance(e, FrameDrawn)]
    assert {event.left_out for event in refused} == {"blacked out by the safety checker"}
    checker.concept_embeds_weights.data.fill_(2.0)  # and never above this
    passed = [e for e in generate(story, model=model, steps=1, iterations=1) if isinstance(e, FrameDrawn)]
    assert {event.left_out for event in passed} == {None}
