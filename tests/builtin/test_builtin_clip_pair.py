"""Risk: CLIP-T of the drawn world says nothing: its pair cannot tell true captions from wrong ones, or learned wrong labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastory.builtin.evaluation.pair import (
    KINDS,
    UNSAID,
    Captioned,
    PairObjective,
    accuracies,
    captioned_frames,
    drawn,
    is_true,
    load_pair,
    sentence,
    with_an_error,
)
from fastory.builtin.training.encoders import ABSENT
from fastory.builtin.training.loop import Plan, train
from fastory.builtin.world.drawing import Character, Role, Scene, Tale
from fastory.evaluation.choices import BUILTIN
from fastory.evaluation.clip import Clip, open_encoder

CAST = (Character("fox", "red", "none", "white"), Character("bear", "blue", "crown", "none"))
BOTH = Scene("snow", (Role(1, "standing"), Role(0, "ball")))


def some_frames(count: int) -> Iterator[tuple[np.random.Generator, Captioned]]:
    rng = np.random.default_rng(7)
    for _ in range(count):
        for frame in captioned_frames(rng, held=False):
            yield rng, frame


def test_labels_of_a_caption_and_of_its_picture_by_hand() -> None:
    frame = Captioned(Tale(CAST), BOTH, (frozenset({"scarf"}), frozenset()))
    bear, fox = [4, 0], [2, 4]  # species and action
    assert frame.labels().tolist() == [1, 1, *bear, *[UNSAID] * 3, *fox, UNSAID, UNSAID, 3]
    assert frame.everything().tolist() == [1, 1, *bear, 3, 3, 0, *fox, 0, 0, 3]
    alone = replace(frame, scene=Scene("snow", (Role(0, "ball"),)))
    assert alone.labels().tolist() == [0, 1, *fox, UNSAID, UNSAID, 3, *[ABSENT] * 5]


def test_a_wrong_caption_is_wrong_in_one_thing_and_a_true_one_is_true() -> None:
    """A picture's labels fit its caption's, and no longer fit when one thing is changed."""
    seen = set()
    for rng, frame in some_frames(40):
        shown = torch.from_numpy(frame.everything())[None]
        assert is_true(torch.from_numpy(frame.labels())[None], shown).all()
        for kind in KINDS:
            if kind == "sides" and len(frame.scene.roles) == 1:
                continue
            wrong = with_an_error(rng, frame, kind)
            assert not is_true(torch.from_numpy(wrong.labels())[None], shown).any(), kind
            changed = (wrong.everything() != frame.everything()).sum()
            assert changed == 1 or kind == "sides"
            sentence(rng, wrong, ("Anabel", "Theo")[: len(wrong.tale.cast)])  # it fits, with names too
            seen.add(kind)
    assert seen == set(KINDS)


def test_captions_that_hold_of_another_picture_are_no_negatives() -> None:
    """Of three captions that all hold of all pictures nothing is left but a picture's own: the loss is zero."""
    objective = PairObjective()
    cosines = torch.randn(3, 3)
    everything_true = torch.ones(3, 3, dtype=torch.bool)
    assert objective._contrast(cosines, everything_true).item() == pytest.approx(0.0, abs=1e-6)
    assert objective._contrast(cosines, torch.eye(3, dtype=torch.bool)).item() > 0.1


def test_the_pair_that_ships_tells_true_captions_from_wrong_ones() -> None:
    """Held-out scenes among them. MODEL_CARD.md has the figures of 200 and 1000 pictures; these are few."""
    found = accuracies(load_pair(), pictures=60, pairs=40)
    assert min(value for name, value in found.items() if "retrieved" in name) >= 0.85, found
    assert min(found[kind] for kind in KINDS) >= 0.75, found


def test_what_measures_is_what_was_trained() -> None:
    """Features through --encoder builtin are those of the training's own forward."""
    objective, encoder = load_pair(), open_encoder(BUILTIN)
    assert isinstance(encoder, Clip) and encoder.name == BUILTIN
    rng = np.random.default_rng(0)
    frames = captioned_frames(rng, held=True)
    texts, pictures = [sentence(rng, frame) for frame in frames], drawn(rng, frames)
    torch.testing.assert_close(encoder.captions(texts), objective.captions(texts), atol=1e-5, rtol=0)
    seen = encoder.pictures([Image.fromarray(picture) for picture in pictures])
    torch.testing.assert_close(seen, objective.pictures_seen(pictures), atol=1e-4, rtol=0)


def test_a_trained_pair_is_written_as_transformers_reads_it(tmp_path: Path) -> None:
    """Two steps from nothing: the state is there to go on from, and the folder opens as any CLIP."""
    torch.manual_seed(0)
    objective = PairObjective(pictures=4)
    before = objective.pair.visual_projection.weight.detach().clone()
    train(objective, Plan(tmp_path, steps=2))
    assert not torch.equal(objective.pair.visual_projection.weight, before)
    objective.finish(tmp_path / "pair")
    opened = Clip(tmp_path / "pair")
    assert opened.captions(["a fox in the snow"]).shape == (1, 64)
    assert (tmp_path / "state-pair" / "state.json").exists()
