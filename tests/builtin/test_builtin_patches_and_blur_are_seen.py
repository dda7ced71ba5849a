"""Risk: a body of two colours, or a blurred picture, scores like a drawn one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fastory.builtin.evaluation.iterative import HeldOutStory, held_out_stories
from fastory.builtin.evaluation.quality import (
    body_pixels,
    calibrate,
    colour_shares,
    edge_energy,
    purities,
    quality_scores,
)
from fastory.builtin.world.drawing import BODY_RGB, COLOURS, draw


def drawn(story: HeldOutStory, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([np.asarray(draw(story.tale.cast, scene, rng)) for scene in story.tale.scenes])


def blurred(pictures: np.ndarray) -> np.ndarray:
    blur = ImageFilter.GaussianBlur(1)
    return np.stack([np.asarray(Image.fromarray(picture).filter(blur)) for picture in pictures])


@pytest.fixture(scope="module")
def stories() -> list[HeldOutStory]:
    return held_out_stories(6, seed=11)


def test_drawn_bodies_are_pure_and_of_their_own_colour(stories: list[HeldOutStory]) -> None:
    for story in stories:
        for picture, scene in zip(drawn(story), story.tale.scenes, strict=True):
            species = tuple(story.tale.cast[role.member].species for role in scene.roles)
            actions = tuple(role.action for role in scene.roles)
            for slot, role in enumerate(scene.roles):
                shares = colour_shares(picture, body_pixels(species, actions, slot))
                if shares is not None:
                    assert shares.max() > 0.9
                    assert COLOURS[int(shares.argmax())] == story.tale.cast[role.member].colour


def test_a_patch_lowers_the_purity_by_its_share(stories: list[HeldOutStory]) -> None:
    """The upper half of a body in another colour: what the judge may still call by the lower half's name."""
    story = next(one for one in stories if len(one.tale.cast) == 1)
    (member,) = story.tale.cast
    other = np.array(BODY_RGB["purple" if member.colour != "purple" else "green"], dtype=np.uint8)
    pictures = drawn(story)
    before = purities(story, pictures)
    shares = []
    for picture, scene in zip(pictures, story.tale.scenes, strict=True):
        pixels = body_pixels((member.species,), (scene.roles[0].action,), 0)
        upper = pixels.copy()
        upper[int(np.median(np.nonzero(pixels)[0])) :] = False
        picture[upper] = other
        shares.append(upper.sum() / pixels.sum())
    after = purities(story, pictures)
    told = np.isfinite(after)
    assert told.any() and (before[told] > 0.95).all()
    # Lines among the pixels do not count, so the larger of the two parts is known to a few pixels.
    wanted = np.maximum(shares, 1 - np.array(shares))
    np.testing.assert_allclose(after[told], wanted[told], atol=0.08)
    scores = quality_scores(story, pictures, patched_below=0.86)
    assert scores["patched"] == 1.0 and quality_scores(story, drawn(story), 0.86)["patched"] == 0.0


def test_blur_lowers_the_edge_energy(stories: list[HeldOutStory]) -> None:
    pictures = drawn(stories[0])
    assert edge_energy(blurred(pictures)) < 0.6 * edge_energy(pictures)
    # One bright pixel on black: |4v| once and |v| at its four neighbours, over the inner pixels.
    dot = np.zeros((1, 5, 5, 3), dtype=np.uint8)
    dot[0, 2, 2] = 90
    assert edge_energy(dot) == pytest.approx(8 * 90 / 9)


def test_what_is_restored_sets_the_bar(stories: list[HeldOutStory]) -> None:
    found = calibrate(stories, blurred)
    assert found["edge energy restored"] < found["edge energy drawn"]
    assert found["patched below"] <= found["purity restored"] <= 1
    assert 0.8 < found["bodies told"] <= 1
