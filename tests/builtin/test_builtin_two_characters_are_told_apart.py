"""Two characters that end up alike must not pass for consistent ones: measures of looks on answers of a judge made up here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastory.builtin.evaluation.distinct import (
    distinct_of_own_looks,
    distinct_scores,
    same_mode,
    shares_of_one_look,
    strangers_alike,
)
from fastory.builtin.evaluation.iterative import HeldOutStory, Judged, held_out_stories, scores
from fastory.builtin.world.corpus import sample_tale
from fastory.builtin.world.drawing import COLOURS, HATS, SCARVES, Character, Role, Scene, Tale

FREE = {"colour": COLOURS, "hat": HATS, "scarf": SCARVES}
CAST = (Character("fox", "red", "none", "none"), Character("bear", "blue", "crown", "white"))
# Each alone, then both in either order.
SCENES = (
    *(Scene("snow", (Role(0, "flag"),)), Scene("snow", (Role(1, "flag"),))),
    *(Scene("city", (Role(0, "book"), Role(1, "ball"))), Scene("city", (Role(1, "book"), Role(0, "ball")))),
)


def judged(*shown: dict[str, list[int]]) -> Judged:
    """What a judge says of SCENES. shown: for each character and attribute the values in its three appearances."""
    story = HeldOutStory(Tale(CAST, SCENES), ("",) * 4, 5)
    places = [[(0, 0), (2, 0), (3, 1)], [(1, 0), (2, 1), (3, 0)]]
    free = {name: np.zeros((4, 2), int) for name in FREE}
    for character, values in enumerate(shown):
        for name in FREE:
            for place, value in zip(places[character], values[name], strict=True):
                free[name][place] = value
    two = np.array([False, False, True, True])
    blank = np.zeros((4, 2), int)
    return Judged(story, two, np.zeros(4, int), blank, blank, free)


def looking(colour: list[int], hat: list[int] | None = None, scarf: list[int] | None = None) -> dict:
    return {"colour": colour, "hat": hat or [1, 1, 1], "scarf": scarf or [2, 2, 2]}


def test_characters_with_looks_of_their_own_are_distinct() -> None:
    found = distinct_scores(judged(looking([0, 0, 0]), looking([3, 3, 3], [2, 2, 2], [0, 0, 0])))
    assert found["distinct"] == 1
    for name in FREE:
        assert (found[f"{name} within"], found[f"{name} across"], found[f"one {name}"]) == (1, 0, 0)


def test_characters_that_end_alike_are_not_distinct_however_consistent_they_are() -> None:
    pictures = judged(looking([4, 4, 4]), looking([4, 4, 4]))
    found = distinct_scores(pictures)
    assert found["distinct"] == 0
    assert [found[f"one {name}"] for name in FREE] == [1, 1, 1]
    assert scores(pictures)["colour"] == 1  # what hid it
    assert "own colours" not in scores(pictures)


def test_counts_of_known_answers() -> None:
    """Colours 0 0 1 and 1 1 2: within 1/3 each, across 2 of 9, no common mode; hats and scarves are one."""
    found = distinct_scores(judged(looking([0, 0, 1]), looking([1, 1, 2])))
    assert found["colour within"] == pytest.approx(1 / 3)
    assert found["colour across"] == pytest.approx(2 / 9)
    assert found["one colour"] == 0
    assert found["distinct"] == pytest.approx((1 / 3 - 2 / 9) / 3)


def test_a_character_in_each_frame_is_followed_not_a_side_of_the_picture() -> None:
    """Exchanging the two in one of the two-character frames changes both: it is theirs, not the left one's."""
    found = distinct_scores(judged(looking([0, 0, 3]), looking([3, 3, 0])))
    assert found["colour within"] == pytest.approx(1 / 3)
    assert found["colour across"] == pytest.approx(4 / 9)


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [
        ([0, 0, 1], [0, 2, 2], 0),
        ([0, 1], [0, 0], 0.5),
        ([0, 1], [0, 1], 0.5),
        ([2, 2], [2], 1),
        ([0, 1], [2, 3], 0),
    ],
)
def test_ties_between_most_frequent_values_count_in_parts(
    first: list[int], second: list[int], share: float
) -> None:
    assert same_mode(np.array(first), np.array(second)) == share


def test_independent_characters_come_out_at_chance() -> None:
    """1/6, 1/4, 1/4 and 0.778 within 4 deviations of 2000 stories."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(2000):
        looks = [[looking(*([int(rng.integers(len(o)))] * 3 for o in FREE.values()))] for _ in range(2)]
        rows.append(distinct_scores(judged(looks[0][0], looks[1][0])))
    for name, options in FREE.items():
        chance = 1 / len(options)
        deviation = (chance * (1 - chance) / 2000) ** 0.5
        assert np.mean([row[f"one {name}"] for row in rows]) == pytest.approx(chance, abs=4 * deviation)
        assert np.mean([row[f"{name} across"] for row in rows]) == pytest.approx(chance, abs=4 * deviation)
    assert np.mean([row["distinct"] for row in rows]) == pytest.approx(distinct_of_own_looks(), abs=0.03)
    assert "2000 stories of two characters" in shares_of_one_look(rows)


def test_a_look_that_is_drawn_often_is_no_sign_that_characters_took_it_over() -> None:
    """Nobody is compared with itself or with who is beside it, and a tie counts in parts.

    Of three stories the colours are 0 and 1; 0 and 2; any of 0, 1 and 3, and 1. All hats are one, and a scarf is shared within
    a story alone.
    """
    stories = [
        judged(looking([0] * 3, None, [0] * 3), looking([1] * 3, None, [0] * 3)),
        judged(looking([0] * 3, None, [1] * 3), looking([2] * 3, None, [1] * 3)),
        judged(looking([0, 1, 3], None, [2] * 3), looking([1] * 3, None, [2] * 3)),
    ]
    found = strangers_alike(stories)
    # 0: first with second, 1, each of them with the third's tie of three, 1/3; 1: the first's with the tie and with the last
    assert found == pytest.approx({"colour": (1 + 2 / 3 + 1 / 3 + 1) / 12, "hat": 1, "scarf": 0})
    line = shares_of_one_look([distinct_scores(story) for story in stories], stories)
    assert "hat 1.000 (0.250, 1.000)" in line and "characters of different stories" in line


def test_no_two_character_story_is_left_out() -> None:
    """Of one species, of one look, with one appearance: every story has every score; one character has none."""
    for cast in ("two", "alike"):
        for story in held_out_stories(20, seed=2, cast=cast):
            frames = len(story.tale.scenes)
            free = {name: np.ones((frames, 2), int) for name in FREE}
            blank = np.zeros((frames, 2), int)
            found = distinct_scores(Judged(story, np.ones(frames, bool), blank[:, 0], blank, blank, free))
            assert found["distinct"] == 0 and len(found) == 10
    alone = judged(looking([0, 0, 0]), looking([1, 1, 1]))
    tale = Tale(CAST[:1], SCENES[:1] * 4)
    assert distinct_scores(replace(alone, story=replace(alone.story, tale=tale))) == {}


def test_a_character_that_is_never_there_is_an_error_not_a_lost_story() -> None:
    story = replace(judged().story, tale=Tale(CAST, SCENES[:1] * 4))
    with pytest.raises(ValueError, match="in no frame"):
        distinct_scores(replace(judged(looking([0, 0, 0]), looking([1, 1, 1])), story=story))


def test_two_of_one_species_are_of_different_colours() -> None:
    rng = np.random.default_rng(0)
    casts = [sample_tale(rng, 4, 2, alike=True).cast for _ in range(100)]
    assert all(a.species == b.species and a.colour != b.colour for a, b in casts)
