"""The stages must fit together: what one writes, the next one reads, and the packed folder draws as it was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from fastory.builtin.training.autoencoder import drawn_pictures, to_tensor
from fastory.builtin.training.denoiser import TRAINED_SCALE, AdapterObjective, Corpus, load_adapter
from fastory.builtin.training.encoders import pixel_values, pixels_of
from fastory.builtin.training.networks import build_image_encoder, build_text_encoder, build_unet, build_vae
from fastory.builtin.training.stages import STAGES, minutes_of, parse
from fastory.builtin.training.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> AdapterObjective:
    """The last stage on untrained networks and two stories."""
    torch.manual_seed(0)
    corpus = Corpus(tmp_path_factory.mktemp("corpus"), 0, 2)
    corpus.open_tables("a", "b")
    vae, image_encoder, tokenizer = build_vae(), build_image_encoder(), build_tokenizer()
    corpus.encode_latents(vae, 0, 1, "cpu")
    corpus.embed_references(vae, image_encoder, 0, 1, "cpu")
    text_encoder = build_text_encoder(len(tokenizer), 40)
    return AdapterObjective(build_unet(), image_encoder, corpus, tokenizer, text_encoder, vae, frames=4)


def test_corpus_encodes_every_story(adapter: AdapterObjective) -> None:
    assert all(np.any(story) for story in adapter.corpus.latents)
    assert all(np.any(frame) for story in adapter.corpus.embeddings for frame in story)


def test_a_retrained_autoencoder_finds_no_stale_latents(adapter: AdapterObjective) -> None:
    other = Corpus(adapter.corpus.folder, 0, 2)
    other.open_tables("another mark")
    assert not np.any(other.latents)


def test_references_are_other_frames_and_dropped_ones_are_zeros(adapter: AdapterObjective) -> None:
    stories, frames = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3])
    dropped = np.array([0.5, 0.1, 0.05, 0.01])
    batch = adapter._references(np.random.default_rng(0), stories, frames, dropped)
    empty = [not row.any() for row in batch["references"]]
    assert empty == [False, True, True, False]
    own = torch.from_numpy(adapter.corpus.embeddings[0, 0].astype(np.float32))
    for seed in range(20):
        batch = adapter._references(np.random.default_rng(seed), stories, frames, np.ones(4))
        assert not any(torch.equal(reference, own) for reference in batch["references"][0])


def test_the_written_adapter_at_the_trained_scale_is_the_trained_one(
    adapter: AdapterObjective, tmp_path: Path
) -> None:
    """to_v_ip carries the factor: weight 0.5 on the file must be weight 1 in training, and a reload must undo it."""
    adapter.finish(tmp_path)
    file = tmp_path / "ip_adapter" / "ip_adapter.safetensors"
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    tensors = load_file(file)
    split: dict[str, dict[str, torch.Tensor]] = {part: {} for part in ("image_proj", "ip_adapter")}
    for key, tensor in tensors.items():
        part, name = key.split(".", 1)
        split[part][name] = tensor
    plain._load_ip_adapter_weights([split])
    references = torch.randn(2, 3, 128)
    inputs = (torch.randn(2, 8, 16, 16), torch.tensor(500), torch.randn(2, 40, 128))
    conditions = {"added_cond_kwargs": {"image_embeds": [references]}}
    with torch.no_grad():
        adapter._set_weight(1.0)
        wanted = adapter.unet(*inputs, **conditions).sample
        for processor in plain.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [TRAINED_SCALE]
        got = plain(*inputs, **conditions).sample
        assert (got - wanted).abs().max() < 1e-4
        load_adapter(adapter.unet, file)
        assert (adapter.unet(*inputs, **conditions).sample - wanted).abs().max() < 1e-4


def test_pixels_of_decoded_pictures_match_those_of_stored_ones() -> None:
    """Two resizers, torch on a device and Pillow: a shift between them would be a shift of every reference."""
    pictures = drawn_pictures(np.random.default_rng(0), 4)
    difference = (pixels_of(to_tensor(pictures)) - pixel_values(pictures)).abs()
    assert (
        difference.mean() < 0.003
    )  # of pixels whose standard deviation is about 1; Pillow rounds between its passes
    assert difference.max() < 0.2


def test_minutes_for_all_stages_are_shared_out() -> None:
    options = parse(["--minutes", "20", "--device", "cuda"])
    assert sum(minutes_of(stage, options) for stage in STAGES) == pytest.approx(20)
    assert minutes_of("vae", parse(["--stage", "vae", "--minutes", "3"])) == 3
