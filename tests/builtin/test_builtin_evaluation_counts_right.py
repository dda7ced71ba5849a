"""A table of figures is only as good as its counting: scores of pictures whose content is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastory.builtin.evaluation.ceiling import ceiling
from fastory.builtin.evaluation.classifier import load_classifier
from fastory.builtin.evaluation.distinct import (
    chance_of_modal_share,
    distinct_scores,
    modal_share,
    pairwise_share,
)
from fastory.builtin.evaluation.iterative import (
    HeldOutStory,
    Judged,
    held_out_stories,
    interval,
    scores,
)
from fastory.builtin.evaluation.quality import pixel_diversity
from fastory.builtin.training.encoders import label

FREE = ("colour", "hat", "scarf")


def perfectly_seen(story: HeldOutStory) -> Judged:
    labels = [label(story.tale, scene) for scene in story.tale.scenes]
    slots = np.maximum(np.stack([one.slots for one in labels]), 0)
    return Judged(
        story,
        np.array([len(scene.roles) == 2 for scene in story.tale.scenes]),
        np.array([one.place for one in labels]),
        slots[:, :, 0],
        slots[:, :, 1],
        {name: slots[:, :, 2 + column] for column, name in enumerate(FREE)},
    )


def two_character_story() -> Judged:
    for story in held_out_stories(40, seed=3):
        if len(story.tale.cast) == 2 and story.tale.cast[0].colour != story.tale.cast[1].colour:
            judged = perfectly_seen(story)
            if judged.two.sum() >= 3 and min(len(values) for values in judged.shown("colour")) >= 5:
                return judged
    raise AssertionError("no story with two differently coloured characters")


@pytest.mark.parametrize("index", range(4))
def test_perfect_pictures_score_one(index: int) -> None:
    judged = perfectly_seen(held_out_stories(4, seed=1)[index])
    found = {name: value for name, value in scores(judged).items() if name not in distinct_scores(judged)}
    assert set(found.values()) == {1.0}


def test_a_swapped_pair_is_seen() -> None:
    judged = two_character_story()
    colour = judged.free["colour"].copy()
    frame = int(np.flatnonzero(judged.two)[0])
    colour[frame] = colour[frame][::-1]
    found = scores(replace(judged, free={**judged.free, "colour": colour}))
    assert found["own colours"] == pytest.approx(1 - 1 / judged.two.sum())
    assert found["both right"] == 1.0
    assert found["colour"] < 1.0


def test_a_said_look_that_is_not_drawn_is_seen() -> None:
    story = held_out_stories(1, seed=4, cast="two", said=1.0)[0]
    judged = perfectly_seen(story)
    found = scores(judged)
    assert {value for name, value in found.items() if name.startswith("said")} == {1.0}
    told = [
        (frame, slot)
        for frame, (said, scene) in enumerate(zip(story.said, story.tale.scenes, strict=True))
        for slot, role in enumerate(scene.roles)
        if "hat" in said[role.member] and len(scene.roles) == 2
    ]
    hat = judged.free["hat"].copy()
    hat[told[0]] = (hat[told[0]] + 1) % 4
    found = scores(replace(judged, free={**judged.free, "hat": hat}))
    assert found["said hat 2"] == pytest.approx(1 - 1 / len(told))
    assert found["said colour 2"] == 1.0


def test_stories_without_said_looks_have_the_captions_they_had() -> None:
    """The tables of a model before and after its captions could say looks are of the same stories."""
    story = held_out_stories(2, seed=5, cast="two")[1]
    assert story.said == ()
    assert story.captions[0] == "The turtle jumps inside the house"


def test_what_an_autoencoder_hides_lowers_the_ceiling() -> None:
    """Without the ceiling, colours that no model could show count as its faults."""
    stories, classifier = held_out_stories(6, seed=1), load_classifier()
    plain = ceiling(classifier, stories, lambda pictures: pictures)
    grey = ceiling(
        classifier, stories, lambda pictures: pictures.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)
    )
    assert len(plain) == len(grey) == len(stories)
    for row in plain:
        assert row["colour"] == row["hat"] == row["scarf"] == row["place"] == 1.0
        assert row.get("colour within", 1.0) == row.get("own colours", 1.0) == 1.0
    own = [row["own colours"] for row in grey if "own colours" in row]
    assert own and min(own) < 1.0
    assert np.mean([row["colour"] for row in grey]) < 1.0


def test_exchanged_sides_are_not_both_right() -> None:
    judged = two_character_story()
    found = scores(replace(judged, species=judged.species[:, ::-1]))
    assert found["both right"] == 0.0


def test_a_second_character_where_one_is_due_is_an_error() -> None:
    judged = perfectly_seen(held_out_stories(1, seed=1)[0])
    assert scores(replace(judged, two=np.ones_like(judged.two)))["species"] == 0.0


def test_shares_of_known_values() -> None:
    values = np.array([1, 1, 1, 2])
    assert modal_share(values) == 0.75
    assert pairwise_share(values) == 0.5
    assert chance_of_modal_share([2], 2) == pytest.approx(0.75, abs=0.03)
    assert chance_of_modal_share([8], 6) == pytest.approx(0.39, abs=0.03)


def test_interval_holds_the_mean_and_narrows_with_stories() -> None:
    few, many = interval([0.0, 1.0] * 5), interval([0.0, 1.0] * 200)
    assert few[1] < few[0] < few[2]
    assert many[2] - many[1] < few[2] - few[1]


def test_equal_pictures_have_no_diversity() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    assert pixel_diversity(np.repeat(pictures[:1], 4, 0)) == 0.0
    assert pixel_diversity(pictures) > 20
