"""The start of causal tuning must see what the image encoder saw, learn the right words' attributes, and open as an adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from fastory.builtin.captions import SPECIES_WORDS
from fastory.builtin.encoders import ABSENT
from fastory.builtin.remembering import START, HistoryObjective, build_history_encoder, see_as
from fastory.builtin.world import SPECIES
from fastory.checkpoints.history import read_adapter_config
from fastory.model import StoryModel


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


def test_a_word_learns_the_attributes_of_its_own_character(objective: HistoryObjective) -> None:
    batch = objective.batch(np.random.default_rng(4), 0.0)
    _, (species, *free) = objective.named(batch, batch["pixels"])
    rows, _ = torch.where(objective.species[batch["ids"]] != ABSENT)
    texts = [objective.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["ids"]]
    for number, (row, which) in enumerate(zip(rows, species, strict=True)):
        assert any(word in texts[row].split() for word in SPECIES_WORDS[SPECIES[which]]), texts[row]
        assert [one[number] for one in free] == batch["free"][row, which].tolist()
        assert all(one[number] != ABSENT for one in free)
    shown = (batch["free"][..., 0] != ABSENT).sum()
    assert len(species) == shown  # every character of every caption, once


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
        "from fastory.builtin.tokenizer import build_tokenizer\n"
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
