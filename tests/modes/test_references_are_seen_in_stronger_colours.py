"""Risk: stronger colours reach what is drawn, the search for characters, or pictures that are given; or miss a cut-out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_rounds import CAPTIONS, Kept, noise, settings
from PIL import Image
from ranks import run_alone_and_in_two
from run_folders import contents, end_and_resume, is_picture, redraw_one

from fastory import InputError, Story, StoryModel, generate
from fastory.conditioning.regions import cut_out
from fastory.modes.drawn_rounds import DrawnRounds
from fastory.modes.iterative import prepare_round
from fastory.modes.mode import StoryPlan
from fastory.modes.regions import Regions, Seen
from fastory.pictures import saturated
from fastory.presets import PRESETS

SHORT = CAPTIONS[:3]
STORY = Story.from_captions(SHORT, title="colours")
GIVEN = {"iterations": 2, "steps": 2, "reference_saturation": 1.3, "batch_size": 2}
TWO = """\
title: Two
characters:
  Ann: {prompt: a rabbit%s}
  Bob: {prompt: a fox}
frames:
- {caption: Ann and Bob are standing on the beach, boxes: {Ann: [0, 0, 0.5, 1]}}
- Ann and Bob are sleeping in the snow
"""


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


def two(folder: Path, more: str = "") -> Story:
    (folder / "two.yaml").write_text(TWO % more)
    return Story.read(folder / "two.yaml")


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.3, 4.0])
def test_colours_are_as_far_from_gray_as_said(factor: float) -> None:
    """Held against the weights of ITU-R BT.601 in float64: luma is rounded to a level, and so is the sum."""
    picture = noise(1)[0, 0]
    pixels = np.asarray(picture).astype(float)
    luma = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
    wanted = np.clip(luma + factor * (pixels - luma), 0, 255)
    found = np.asarray(saturated(picture, factor)).astype(float)
    # A luma that is off by e, at most 1, moves luma + f (p - luma) by |1 - f| e; storing it takes 1 more at most.
    assert np.abs(found - wanted).max() <= abs(1 - factor) + 1
    assert saturated(picture, 1.0) is picture


def test_a_reference_is_the_stronger_picture_and_a_round_begins_from_the_drawn_one(model: StoryModel) -> None:
    pictures = noise(2)
    chosen = settings(iterations=3, reference_saturation=1.5, restart=0.6)
    seen = DrawnRounds(model, chosen, Kept(pictures), None).as_reference(1, 2)
    plain = model.encode_reference(pictures[1, 2])
    assert seen.whole is not None and seen.latents is not None
    assert torch.equal(seen.whole, model.encode_reference(saturated(pictures[1, 2], 1.5)))
    assert (seen.whole - plain).abs().max() > 1e-2
    assert torch.equal(seen.latents, model.encode_picture(pictures[1, 2]))


def test_a_cut_out_is_the_stronger_picture_and_characters_are_looked_for_in_the_drawn_one(
    model: StoryModel, tmp_path: Path
) -> None:
    story, picture = two(tmp_path), noise(1)[0, 0]
    prompts = [story.prompt(i) for i in range(2)]
    captions = [model.encode_caption(prompt) for prompt in prompts]

    def seen(factor: float) -> Seen:
        chosen = settings(references="others", reference_saturation=factor)
        regions = Regions(model, story, chosen, prompts, captions, (128, 128))
        return DrawnRounds(model, chosen, Kept({(0, 1): picture}), regions).as_reference(0, 1)

    plain, strong = seen(1.0), seen(1.5)
    assert set(plain.masks) == set(strong.masks) == {"Ann", "Bob"}
    assert all(torch.equal(plain.masks[name], strong.masks[name]) for name in plain.masks)
    assert plain.own and plain.own.keys() == strong.own.keys()
    for name, tokens in strong.own.items():
        (other,) = (mask for who, mask in plain.masks.items() if who != name)
        part = cut_out(saturated(picture, 1.5), plain.masks[name], other.clamp(max=1))
        assert part is not None and torch.equal(tokens, model.encode_reference(part))
        assert not torch.equal(tokens, plain.own[name])


def test_pictures_that_are_given_for_a_character_are_seen_as_they_are(
    model: StoryModel, tmp_path: Path
) -> None:
    Image.new("RGB", (48, 48), (200, 90, 60)).save(tmp_path / "ann.png")
    story, pictures = two(tmp_path, ", references: [ann.png]"), noise(1)

    def read(factor: float) -> torch.Tensor:
        chosen = settings(iterations=1, steps=1, regions="off", references="all", reference_saturation=factor)
        sampler, _ = prepare_round(model, StoryPlan(story, chosen, finished=Kept(pictures)), 1, 1)
        return sampler.context.ref_kv.clone()  # type: ignore[union-attr]

    plain, strong, per_ref = read(1.0), read(1.5), model.tokens_per_ref
    drawn = 2 * per_ref  # of both frames; their null block, Ann's picture and its null block follow
    assert plain.shape[1] == drawn + 3 * per_ref
    assert (plain[:, :drawn] - strong[:, :drawn]).abs().max() > 1e-2
    assert torch.equal(plain[:, drawn:], strong[:, drawn:])


@pytest.mark.parametrize("latest", [False, True])
def test_a_run_is_resumed_to_the_same_bytes(model: StoryModel, tmp_path: Path, latest: bool) -> None:
    given = {"model": model, **GIVEN, "references_from": "latest" if latest else "last"}
    list(generate(STORY, output=tmp_path / "whole", **given))
    end_and_resume(STORY, tmp_path / "cut", is_picture(2, 1), **given)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert "in 1.3 times their saturation" in (tmp_path / "whole/storybook.html").read_text()


def test_a_redrawn_frame_leaves_the_others_alone(model: StoryModel, tmp_path: Path) -> None:
    again, changed = redraw_one(STORY, 1, tmp_path / "run", model=model, **GIVEN)
    assert again == {(k, 1) for k in range(3)}
    assert changed == {1}


@pytest.mark.slow
def test_several_processes_see_the_same_colours(tmp_path: Path) -> None:
    options = ["--iterations=2", "--steps=1", "--reference-saturation=1.3", "--batch-size=1", "--quiet"]
    alone, together = (files for _, files in run_alone_and_in_two(SHORT, options, tmp_path))
    assert alone == together


def test_the_paper_has_none_and_what_it_takes_is_said(model: StoryModel) -> None:
    assert "reference_saturation" not in settings().identity()
    assert PRESETS["paper"]["reference_saturation"] == 1
    with pytest.raises(InputError, match=r"reference_saturation .*wanted 0 to 4, got 4.5"):
        generate(STORY, model=model, reference_saturation=4.5)
    none = {"iterations": 0, "steps": 1, "references_from": "last"}
    events = generate(STORY, model=model, reference_saturation=1.3, **none)  # type: ignore[arg-type]
    assert any("`reference_saturation` is not used" in str(event) for event in events)
