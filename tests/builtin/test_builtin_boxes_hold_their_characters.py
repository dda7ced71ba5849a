"""A layout's truth is the drawn scene's: a box that misses its character, or holds more, would teach and measure another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastory.builtin.world.drawing import (
    ACTIONS,
    COLOURS,
    HATS,
    SCARVES,
    SIZE,
    SPECIES,
    Character,
    Role,
    Scene,
    draw,
    draw_with_boxes,
)

STROKE = 2  # half an outline of 1.7 pixels, and the pixel that a box's edge lies in


def drawn(cast: tuple[Character, ...], scene: Scene) -> np.ndarray:
    return np.asarray(draw(cast, scene, np.random.default_rng(3)), np.int64)


def changed(cast: tuple[Character, ...], member: int, scene: Scene) -> np.ndarray:
    """The pixels that change when a character's look does: body, hat and scarf."""
    own = drawn(cast, scene)
    found = np.zeros((SIZE, SIZE), bool)
    for name, options in (("colour", COLOURS), ("hat", HATS), ("scarf", SCARVES)):
        for value in options:
            other = tuple(replace(c, **{name: value}) if n == member else c for n, c in enumerate(cast))
            if other[member].hat == cast[member].hat or value == "none":  # larger hats are not in the box
                found |= (drawn(other, scene) != own).any(-1)
    return found


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("order", [(0,), (0, 1), (1, 0)])
def test_a_look_changes_inside_its_box_and_up_to_its_edges(order: tuple[int, ...], action: str) -> None:
    for species in SPECIES:
        cast = (Character(species, "red", "crown", "orange"), Character("fox", "blue", "cone", "white"))
        scene = Scene("beach", tuple(Role(member, action) for member in order))
        _, boxes = draw_with_boxes(cast, scene, np.random.default_rng(3))
        assert len(boxes) == len(order)
        for role, box in zip(scene.roles, boxes, strict=True):
            rows, columns = np.nonzero(changed(cast, role.member, scene))
            left, top, right, bottom = (SIZE * edge for edge in box)
            assert 0 <= left <= columns.min() + STROKE and columns.max() <= right + STROKE
            assert 0 <= top <= rows.min() + STROKE and rows.max() <= bottom + STROKE
            assert right <= SIZE and bottom <= SIZE
            if species in ("rabbit", "bear") and action in (
                "standing",
                "jumping",
            ):  # all coloured, nothing held
                # An outline and the crown's outermost point are as wide as this.
                edges = left - columns.min(), top - rows.min(), right - columns.max(), bottom - rows.max()
                assert max(abs(edge) for edge in edges) < 4


def test_what_is_held_is_in_the_box_and_the_first_of_two_is_on_the_left() -> None:
    cast = (Character("bear", "red", "none", "none"), Character("cat", "red", "none", "none"))
    plain, flag = (
        draw_with_boxes(
            cast, Scene("snow", (Role(1, action), Role(0, "standing"))), np.random.default_rng(0)
        )[1]
        for action in ("standing", "flag")
    )
    assert plain[0][2] < plain[1][2] and plain[0][0] < plain[1][0]
    assert flag[0][2] > plain[0][2] + 0.05 and flag[0][1] < plain[0][1]
    assert flag[1] == plain[1]


def test_the_picture_is_the_one_without_boxes() -> None:
    cast = (Character("turtle", "green", "tophat", "none"),)
    scene = Scene("house", (Role(0, "book"),))
    picture, _ = draw_with_boxes(cast, scene, np.random.default_rng(1))
    assert picture.tobytes() == draw(cast, scene, np.random.default_rng(1)).tobytes()
