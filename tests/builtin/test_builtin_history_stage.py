"""The start of causal tuning must see what the image encoder saw, learn the right words' attributes, and open as an adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from fastory.builtin.training.encoders import ABSENT
from fastory.builtin.training.patches import patchy
from fastory.builtin.training.remembering import (
    START,
    HistoryObjective,
    build_history_encoder,
    see_as,
)
from fastory.builtin.words import SPECIES_WORDS
from fastory.builtin.world.corpus import sample_tale
from fastory.builtin.world.drawing import COLOURS, SIZE, SPECIES, Scene, Tale, draw
from fastory.checkpoints.history import read_adapter_config
from fastory.models.torch_model import StoryModel


@pytest.fixture(scope="module")
def objective(builtin_folder: Path) -> HistoryObjective:
    """The stage on the shipped networks."""
    torch.manual_seed(0)
    return HistoryObjective(
        AutoencoderKL.from_pretrained(builtin_folder / "vae"),
        CLIPTextModel.from_pretrained(builtin_folder / "text_encoder").float(),
        CLIPVisionModelWithProjection.from_pretrained(builtin_folder / "image_encoder").float(),
        CLIPTokenizer.from_pretrained(builtin_folder / "tokenizer"),
        pictures=20,
    )


def test_blip_begins_as_the_image_encoder_sees(objective: HistoryObjective, builtin_folder: Path) -> None:
    """Only CLIP's first normalisation is missing: the last layer's states agree in direction, a random start's do not."""
    clip = CLIPVisionModelWithProjection.from_pretrained(builtin_folder / "image_encoder").float()
    pixels = objective.batch(np.random.default_rng(3), 0.0)["pixels"]
    random, seeing = (build_history_encoder(len(objective.tokenizer)).vision for _ in range(2))
    see_as(seeing, clip, pixels)
    with torch.no_grad():
        wanted = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
        alike = [
            torch.cosine_similarity(one(pixels, output_hidden_states=True).hidden_states[-1], wanted, dim=-1)
            for one in (random, seeing)
        ]
    assert alike[1].mean() > 0.9 > 0.3 > alike[0].mean()


def test_every_token_learns_the_attributes_of_the_nearest_character(objective: HistoryObjective) -> None:
    """Against a search through the caption's own tokens."""
    batch = objective.batch(np.random.default_rng(4), 0.0)
    _, (species, *free) = objective.named(batch, batch["pixels"])
    of_word = {word: number for number, name in enumerate(SPECIES) for word in SPECIES_WORDS[name]}
    expected = []
    for ids, shown in zip(batch["ids"].tolist(), batch["free"], strict=True):
        words = [objective.tokenizer.decode([token]).strip() for token in ids]
        length = ids.index(objective.tokenizer.eos_token_id) + 1
        places = [place for place, word in enumerate(words) if word in of_word]
        assert 1 <= len(places) <= 2
        for token in range(length):
            nearest = min(places, key=lambda place: abs(place - token))  # the first of two as near
            which = of_word[words[nearest]]
            expected.append([which, *shown[which].tolist()])
    assert torch.stack([species, *free], 1).tolist() == expected
    assert all(value != ABSENT for row in expected for value in row)


def test_a_patchy_picture_is_mostly_of_the_colour_that_is_named() -> None:
    """Every character's: its pixels lie on the way to one other colour, less than half of it; half have no patches."""
    rng = np.random.default_rng(7)
    shares, untouched = [], 0
    for number in range(30):
        tale = sample_tale(rng, 4, 1 + number % 2)
        for scene in tale.scenes:
            before = deepcopy(rng)
            picture = np.asarray(patchy(tale.cast, scene, rng), np.float64)
            seed = int(before.integers(2**62))
            own = np.asarray(draw(tale.cast, scene, np.random.default_rng(seed)), np.float64)
            untouched += np.array_equal(picture, own)
            if np.array_equal(picture, own):
                continue
            for role, columns in zip(scene.roles, np.split(np.arange(SIZE), len(scene.roles)), strict=True):
                found = [
                    patches_towards(colour, role.member, tale, scene, seed, own, picture, columns)
                    for colour in COLOURS
                    if colour != tale.cast[role.member].colour
                ]
                residual, share = min(found)
                assert residual <= 1.5  # of 255: rounding
                shares.append(share)
    assert max(shares) < 0.6 and 0.1 < np.mean(shares) < 0.35  # faded edges go a little beyond 0.4
    assert 40 < untouched < 80


def patches_towards(
    colour: str, member: int, tale: Tale, scene: Scene, seed: int, own: Any, picture: Any, columns: Any
) -> tuple[float, float]:
    """How far the picture is from a mixture with this colour, at worst, and the mean share of the colour on the body."""
    cast = tuple(replace(c, colour=colour) if n == member else c for n, c in enumerate(tale.cast))
    change = (np.asarray(draw(cast, scene, np.random.default_rng(seed)), np.float64) - own)[:, columns]
    seen = (picture - own)[:, columns]
    body = np.abs(change).max(-1) > 30
    share = (seen * change).sum(-1)[body] / (change**2).sum(-1)[body]
    residual = np.abs(seen[body] - share[:, None] * change[body]).max()
    return float(residual), float(share.mean())


def test_a_few_steps_learn_and_the_start_opens(objective: HistoryObjective, tmp_path: Path) -> None:
    torch.manual_seed(1)
    learning = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, 1e-3)
    batch = objective.batch(np.random.default_rng(5), 0.0)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = objective(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in learning)
    objective.finish(tmp_path)
    assert read_adapter_config(tmp_path / START) == objective.encoder.config
    opened = StoryModel.open(adapter=str(tmp_path / START), device="cpu", dtype="float32")
    own, loaded = objective.encoder.state_dict(), opened.require_history().encoder.state_dict()
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[name], loaded[name]) for name in own)


def test_every_training_process_reads_a_caption_alike() -> None:
    """The order of a hash map differs from process to process; the ids of a caption must not."""
    code = (
        "from fastory.builtin.training.tokenizer import build_tokenizer\n"
        "tokenizer = build_tokenizer()\n"
        "print(sorted(tokenizer.get_vocab().items()), tokenizer('A fox and Zebulon nap')['input_ids'])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(told) == 1
