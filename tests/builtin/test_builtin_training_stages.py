"""The stages must fit together: what one writes, the next one reads, and the packed folder draws as it was trained."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from fastory.builtin import WEIGHTS
from fastory.builtin.training.adapter import (
    CONTRADICTED,
    TRAINED_SCALE,
    AdapterObjective,
    _appearances,
    _members_by_species,
    adapter_processors,
    fresh_adapter,
    load_adapter,
)
from fastory.builtin.training.autoencoder import drawn_pictures, to_tensor
from fastory.builtin.training.characters import GroupedAdapter
from fastory.builtin.training.denoiser import PATCHED_REFERENCES, PURE_NOISE, Corpus, Drawn
from fastory.builtin.training.encoders import pixel_values, pixels_of
from fastory.builtin.training.networks import (
    build_image_encoder,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
)
from fastory.builtin.training.pack import give_rows_to_new_words
from fastory.builtin.training.stages import STAGES, build_objective, main, minutes_of, parse, start_from
from fastory.builtin.training.tokenizer import build_tokenizer
from fastory.builtin.world.looks import ATTRIBUTES, NOTHING


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> AdapterObjective:
    """The last stage on untrained networks and two stories."""
    torch.manual_seed(0)
    corpus = Corpus(tmp_path_factory.mktemp("corpus"), 0, 4)
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


def test_references_may_have_patches_in_the_same_places_and_latents_have_none(
    adapter: AdapterObjective,
) -> None:
    corpus = Corpus(adapter.corpus.folder, 0, 4)
    shown = {}
    for share in (0.0, 1.0):
        corpus.patched = share
        shown[share] = corpus[2]
    assert torch.equal(shown[0.0][3], shown[1.0][3])  # boxes
    changed = [
        float((a != b).any(0).float().mean()) for a, b in zip(shown[0.0][1], shown[1.0][1], strict=True)
    ]
    assert all(share < 0.3 for share in changed) and max(changed) > 0.01  # of the picture: bodies, in part
    assert adapter.corpus.patched == PATCHED_REFERENCES  # its latents were encoded before its embeddings
    vae = adapter._frozen[0]
    with torch.no_grad():
        found = vae.encode(shown[0.0][1]).latent_dist.mean * vae.config.scaling_factor
    # float16 of values near 1
    assert np.abs(found.numpy() - adapter.corpus.latents[2]).max() < 4e-3


def test_the_text_encoder_learns_with_the_unet_and_is_written(
    adapter: AdapterObjective, tmp_path: Path
) -> None:
    batch = adapter.batch(np.random.default_rng(1), 0.5)
    adapter(batch).backward()
    gradients = [p.grad for p in adapter.text_encoder.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    adapter.zero_grad()
    adapter.finish(tmp_path)
    written = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").state_dict()
    assert all(torch.equal(written[k], v) for k, v in adapter.text_encoder.state_dict().items())


def test_the_hastened_objective_is_the_same_loss_in_bfloat16(adapter: AdapterObjective) -> None:
    hastened = copy.deepcopy(adapter)
    hastened.hasten()
    batch = adapter.batch(np.random.default_rng(2), 0.5)
    found = []
    for objective in (adapter, hastened):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=objective is hastened):
            loss = objective(batch)
        loss.backward()
        weight = objective.unet.conv_in.weight
        found.append((loss.item(), weight.grad.clone()))
        objective.zero_grad()
    (loss, gradient), (other, near) = found
    # bfloat16 rounds to 2**-9 of a value; of independent errors in some twenty products after one another, twenty times that
    # squared is lost of the cosine, and a sum over many elements loses less.
    assert other == pytest.approx(loss, rel=0.01)
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), near.flatten(), dim=0) > 0.999


def test_references_are_other_frames_and_dropped_ones_are_zeros(adapter: AdapterObjective) -> None:
    stories, frames = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3])
    dropped = np.array([0.5, 0.1, 0.05, 0.01])
    looks = [(NOTHING, NOTHING)] * 4
    batch = adapter._references(np.random.default_rng(0), Drawn(stories, frames, dropped, looks))
    empty = [not row.any() for row in batch["references"]]
    assert empty == [False, True, True, False]
    own = {tuple(row) for row in adapter.corpus.own[0, 0].astype(np.float32)}
    own.add(tuple(adapter.corpus.embeddings[0, 0].astype(np.float32)))
    own.discard((0.0,) * 128)  # of nobody
    for seed in range(20):
        batch = adapter._references(np.random.default_rng(seed), Drawn(stories, frames, np.ones(4), looks))
        assert not own & {tuple(row.tolist()) for row in batch["references"][0]}


def test_each_character_has_its_own_appearances_where_it_stands(adapter: AdapterObjective) -> None:
    """Of every frame: groups of whole pictures, or of each character from other frames, in masks that share the picture."""
    corpus, seen = adapter.corpus, set()
    for story, tale in enumerate(corpus.tales):
        for frame, scene in enumerate(tale.scenes):
            rng = np.random.default_rng(7 * story + frame)
            groups, masks = adapter._grouped(rng, story, frame, (NOTHING, NOTHING))
            assert torch.allclose(masks.sum(0), torch.ones(16, 16), atol=1e-6)
            by_character = masks[0].mean() < 1
            seen.add((len(scene.roles), bool(by_character)))
            if not by_character:
                assert not groups[1:].any()
                continue
            for slot, role in enumerate(scene.roles):
                pool = {
                    tuple(corpus.own[place].astype(np.float32))
                    for place in adapter.kin[tale.cast[role.member].species]
                    if place[:2] != (story, frame)
                }
                assert {tuple(row) for row in groups[1 + slot]} <= pool | {(0.0,) * 128}
                assert masks[1 + slot].mean() > 0.05
            if len(scene.roles) == 2:
                columns = torch.linspace(0, 1, 16)
                centres = [(mask.sum(0) * columns).sum() / mask.sum() for mask in masks[1:]]
                assert centres[0] < 0.5 < centres[1]
    assert {(1, True), (2, True), (1, False), (2, False)} <= seen


def test_references_contradict_a_caption_only_in_what_it_says(adapter: AdapterObjective) -> None:
    objective = copy.copy(adapter)
    objective.corpus = Corpus(adapter.corpus.folder, 0, 300)
    objective.members = _members_by_species(objective.corpus)
    rng, found, tried = np.random.default_rng(0), [], 0
    for tale in objective.corpus.tales[:100]:
        character = tale.cast[0]
        for said in (frozenset({"colour"}), frozenset({"hat", "scarf"})):
            tried += 1
            if shown := objective._contradicting(rng, character, said):
                story, frame, slot = shown[0]
                other = objective.corpus.tales[story]
                body = other.cast[other.scenes[frame].roles[slot].member]
                found.append(
                    {name for name in ATTRIBUTES if getattr(body, name) != getattr(character, name)} - said
                )
                assert body.species == character.species and body != character
        assert objective._contradicting(rng, character, NOTHING) == []
    assert not any(found)
    # Nearly every look has another one of its kind in 300 stories; 200 draws of the share are off by 3.1 sigma at most.
    assert abs(len(found) / tried - CONTRADICTED) < 0.1


def test_contradicting_references_are_the_ones_that_reach_the_character(adapter: AdapterObjective) -> None:
    objective = copy.copy(adapter)
    places = [(2, *place) for place in _appearances(adapter.corpus.tales[2], 0)]
    objective._contradicting = lambda *_: places
    pool = {tuple(adapter.corpus.own[place].astype(np.float32)) for place in places}
    for story, tale in enumerate(adapter.corpus.tales):
        for frame, scene in enumerate(tale.scenes):
            looks = (frozenset({"colour"}),) * len(tale.cast)
            groups, masks = objective._grouped(np.random.default_rng(frame), story, frame, looks)
            for group, mask in zip(groups[1 : 1 + len(scene.roles)], masks[1:], strict=False):
                assert not mask.any() or {tuple(row) for row in group} <= pool


def test_a_run_begins_where_training_has_noise_alone(adapter: AdapterObjective) -> None:
    """The last timestep tells nothing of a picture, every schedule begins there, and training has seen it often."""
    scheduler = build_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0
    for steps in (4, 7, 15, 25):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[0] == 999
    rng, objective = np.random.default_rng(0), copy.copy(adapter)
    objective.frames = 4000
    assert (objective._timesteps(rng) == 999).mean() == pytest.approx(PURE_NOISE, abs=0.01)  # 3 sigma
    latents, noise = torch.randn(1, 8, 16, 16), torch.randn(1, 8, 16, 16)
    last = torch.tensor([999])
    assert torch.equal(scheduler.add_noise(latents, noise, last), noise)
    assert torch.equal(scheduler.get_velocity(latents, noise, last), -latents)


def test_grouped_attention_is_the_stock_one_with_masks_a_group() -> None:
    """One group that reaches everything is diffusers' adapter; halves are its masks, one picture a group."""
    torch.manual_seed(0)
    references, masks = (
        torch.randn(2, 3, 128),
        torch.tensor([0.2, 0.5, 1.0])[None, :, None, None].expand(2, 3, 16, 16),
    )
    inputs = (torch.randn(2, 8, 16, 16), torch.tensor(500), torch.randn(2, 40, 128))
    found: dict[bool, list[torch.Tensor]] = {}
    for grouped in (False, True):
        unet = UNet2DConditionModel.from_pretrained(WEIGHTS / "unet")
        torch.manual_seed(1)
        unet._load_ip_adapter_weights([fresh_adapter(unet)])
        load_adapter(unet, WEIGHTS / "ip_adapter" / "ip_adapter.safetensors")
        for processor in adapter_processors(unet):
            processor.__class__ = GroupedAdapter if grouped else processor.__class__
        for given in (None, masks):
            for processor in adapter_processors(unet):
                processor.scale = [0.8] if grouped or given is None else [[0.8] * 3]
            kwargs = {} if given is None else {"ip_adapter_masks": given if grouped else [given]}
            with torch.no_grad():
                out = unet(
                    *inputs, added_cond_kwargs={"image_embeds": [references]}, cross_attention_kwargs=kwargs
                )
            found.setdefault(grouped, []).append(out.sample)
    for stock, own in zip(found[False], found[True], strict=True):
        assert (stock - own).abs().max() < 1e-5
    assert (found[True][0] - found[True][1]).abs().max() > 1e-2


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


def older_model(folder: Path, forgotten: set[str]) -> Path:
    """The shipped encoders as they were before captions told of looks, and some words never learned: their tokens are gone.

    What was learned later stands behind the end of text, in the vocabulary as in the encoder's table.
    """
    folder.mkdir()
    for name in ("tokenizer", "text_encoder", "image_encoder"):
        shutil.copytree(WEIGHTS / name, folder / name)
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    size = content["added_tokens"][-1]["id"] + 1
    words = {f"{word}</w>" for word in forgotten} | {token for token, i in vocabulary.items() if i >= size}
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) not in words]
    content["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < size}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    encoder.resize_token_embeddings(size)
    encoder.save_pretrained(folder / "text_encoder")
    return folder


def test_new_words_are_learned_and_old_captions_keep_their_states(tmp_path: Path) -> None:
    """Two steps: the new rows and the encoder move, what old captions become hardly does, and the next stage reads it."""
    before = older_model(tmp_path / "before", {"red", "scarf", "fox"})
    (tmp_path / "run" / "model").mkdir(parents=True)
    main(["--stage", "clip", "--workdir", str(tmp_path / "run"), "--init-from", str(before), "--steps", "2",
          "--processes", "1", "--batch", "8", "--device", "cpu"])  # fmt: skip
    made = tmp_path / "run" / "model"
    old, new = (CLIPTokenizer.from_pretrained(f / "tokenizer", local_files_only=True) for f in (before, made))
    assert len(old.tokenize("fox")) > 1
    assert len(new.tokenize("fox")) == 1
    encoders = [CLIPTextModel.from_pretrained(f / "text_encoder").float() for f in (before, made)]
    assert encoders[1].config.vocab_size == len(new) > encoders[0].config.vocab_size
    with torch.no_grad():
        states = [e(t("a bear is jumping", return_tensors="pt").input_ids).last_hidden_state
                  for e, t in zip(encoders, (old, new), strict=True)]  # fmt: skip
    distance = (states[0] - states[1]).abs().max()
    assert 0 < distance < 0.1
    same = [load_file(f / "image_encoder" / "model.safetensors") for f in (before, made)]
    assert all(torch.equal(same[0][key].float(), same[1][key].float()) for key in same[0])


def test_what_old_captions_become_is_held(tmp_path: Path) -> None:
    """Of the loss: captions that say nothing of looks, and they alone, are compared with what they were."""
    options = parse(
        ["--stage", "clip", "--workdir", str(tmp_path), "--init-from", str(WEIGHTS), "--batch", "16"]
    )
    objective = build_objective("clip", options, 0, 1)
    start_from(objective, WEIGHTS)
    batch = objective.batch(np.random.default_rng(0), 0.0)
    assert "pixels" not in batch
    states = objective.text_encoder(batch["ids"]).last_hidden_state
    assert objective._kept_loss(batch, states).item() == 0
    unsaid = (batch["said"] == torch.tensor([6, 4, 4])).flatten(1).all(1)
    assert 0 < unsaid.sum() < len(unsaid)
    assert objective._kept_loss(batch, states + unsaid[:, None, None]).item() == pytest.approx(20)
    assert objective._kept_loss(batch, states + ~unsaid[:, None, None]).item() == 0


def test_a_history_encoder_of_fewer_words_reads_new_ones(tmp_path: Path) -> None:
    key, file = "history.text.embeddings.word_embeddings.weight", tmp_path / "adapter.safetensors"
    table = torch.randn(5, 2)
    save_file(
        {key: table, "other": table.clone()}, file, {"history": json.dumps({"text": {"vocab_size": 5}})}
    )
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True)
    give_rows_to_new_words(file, tokenizer)
    grown = load_file(file)
    assert torch.equal(grown["other"], table)
    assert torch.equal(grown[key][:5], table)
    assert grown[key].shape == (len(tokenizer), 2)
    assert torch.allclose(grown[key][5:], table.mean(0).expand(len(tokenizer) - 5, -1))
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["history"])["text"]["vocab_size"] == len(tokenizer)
