"""A figure on held-out stories means nothing if training has seen their scenes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastory.builtin.evaluation.iterative import held_out_stories
from fastory.builtin.training.drawn_stories import other_looks
from fastory.builtin.world.corpus import (
    HELD_OUT_FILE,
    choose_held_out,
    choose_held_out_looks,
    held_out,
    held_out_looks,
    sample_tale,
    sample_training_tale,
    triples,
)
from fastory.builtin.world.drawing import ACTIONS, COLOURS, HATS, PLACES, SCARVES, SPECIES, Character


def test_no_training_story_shows_a_held_out_scene() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        tale = sample_training_tale(rng)
        assert not held_out() & {triple for scene in tale.scenes for triple in triples(tale.cast, scene)}


def test_every_scene_of_the_evaluation_is_held_out() -> None:
    for story in held_out_stories(20, seed=1):
        shown = {triple for scene in story.tale.scenes for triple in triples(story.tale.cast, scene)}
        assert shown <= held_out()


def test_the_committed_list_is_the_one_chosen_before_training() -> None:
    committed = json.loads(HELD_OUT_FILE.read_text(encoding="utf-8"))["triples"]
    assert [tuple(triple) for triple in committed] == choose_held_out()


def looks_of(cast: tuple[Character, ...]) -> set[tuple[str, str, str, str]]:
    return {(c.species, c.colour, c.hat, c.scarf) for c in cast}


def test_no_training_story_shows_a_held_out_look() -> None:
    rng = np.random.default_rng(0)
    for _ in range(600):
        cast = sample_training_tale(rng, 4).cast
        assert not held_out_looks() & (looks_of(cast) | looks_of(other_looks(cast, 3, rng)))


@pytest.mark.parametrize("cast", ["mixed", "two", "alike"])
def test_every_look_that_the_evaluation_says_is_held_out(cast: str) -> None:
    for story in held_out_stories(20, seed=1, cast=cast, said=0.5):
        assert looks_of(story.tale.cast) <= held_out_looks()


def test_the_committed_looks_are_those_chosen_before_training() -> None:
    committed = json.loads(HELD_OUT_FILE.read_text(encoding="utf-8"))["looks"]
    assert [tuple(look) for look in committed] == choose_held_out_looks()


def test_held_out_looks_leave_every_pair_to_be_learned() -> None:
    every = {(s, c, h, f) for s in SPECIES for c in COLOURS for h in HATS for f in SCARVES}
    trained = every - held_out_looks()
    for kept in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        assert {tuple(look[i] for i in kept) for look in trained} == {
            tuple(look[i] for i in kept) for look in every
        }
    held = [look[1] for look in held_out_looks()]
    assert {held.count(colour) for colour in COLOURS} == {12}


def test_held_out_scenes_leave_every_pair_to_be_learned() -> None:
    """A species in a place, a species doing something: each pair must remain in some scene that is trained."""
    trained = {(s, p, a) for s in SPECIES for p in PLACES for a in ACTIONS} - held_out()
    assert {(s, p) for s, p, _ in trained} == {(s, p) for s in SPECIES for p in PLACES}
    assert {(s, a) for s, _, a in trained} == {(s, a) for s in SPECIES for a in ACTIONS}
    assert {(p, a) for _, p, a in trained} == {(p, a) for p in PLACES for a in ACTIONS}


@pytest.mark.parametrize("frames", [3, 41])
def test_a_story_length_outside_4_to_40_is_refused(frames: int) -> None:
    with pytest.raises(ValueError, match="4 to 40"):
        sample_tale(np.random.default_rng(0), frames, 1)


def test_casts_recur_and_two_characters_meet() -> None:
    tale = sample_tale(np.random.default_rng(2), 40, 2)
    members = [tuple(role.member for role in scene.roles) for scene in tale.scenes]
    assert len(tale.scenes) == 40
    assert {(0,), (1,), (0, 1), (1, 0)} == set(members)
