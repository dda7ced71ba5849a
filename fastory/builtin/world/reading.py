"""From a caption of the drawn world back to its scene: who stands where, doing what, in which place.

What evaluation holds a picture against where no scene is at hand but a user's caption.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fastory.builtin.words import ACTION_PHRASES, ACTION_VERBS, PLACE_PHRASES, SPECIES_WORDS
from fastory.builtin.world.drawing import Character, Role, Scene, Tale

MOST_ROLES = 2  # characters of a picture, and of a story
ACTIONS = {name: (*phrases, *ACTION_VERBS[name]) for name, phrases in ACTION_PHRASES.items()}
UNSEEN = ("none", "none", "none")  # colour, hat and scarf: no caption that is read says them


class UnreadableCaption(ValueError):
    """A caption that names no place, or not one or two animals."""


def read_tale(captions: Sequence[str]) -> Tale:
    """The scenes of a story's captions, with a cast of one or two characters, of different species.

    A caption may be a frame's prompt, in which a named character is described. Of the cast's look nothing is known. Raises
    UnreadableCaption, which names the frame, for captions of other worlds.
    """
    read = [_read(i, caption) for i, caption in enumerate(captions)]
    species = list(dict.fromkeys(name for _, roles in read for name, _ in roles))
    if len(species) > MOST_ROLES:
        raise UnreadableCaption(f"a story of {len(species)} kinds of animals; wanted one or two")
    cast = tuple(Character(name, *UNSEEN) for name in species)
    scenes = tuple(
        Scene(where, tuple(Role(species.index(name), action) for name, action in roles))
        for where, roles in read
    )
    return Tale(cast, scenes)


def _read(frame: int, caption: str) -> tuple[str, list[tuple[str, str]]]:
    """The place, and species and action of each role, from left to right."""
    text = caption.lower()
    places, animals = _found(PLACE_PHRASES, text), _found(SPECIES_WORDS, text)
    if not places:
        raise UnreadableCaption(f"frame {frame}: the caption names no place of the drawn world")
    if not 1 <= len(animals) <= MOST_ROLES or len({name for _, name in animals}) < len(animals):
        raise UnreadableCaption(
            f"frame {frame}: wanted one animal, or two of different kinds, got {len(animals)}"
        )
    actions = _found(ACTIONS, text)
    roles = [
        (name, next((action for at, action in actions if at > subject), "standing"))
        for subject, name in animals
    ]
    # "a fox on the right sleeps and a bear on the left reads" says the right one first
    sides = [
        match.start() for side in ("left", "right") for match in re.finditer(rf"\bon the {side}\b", text)
    ]
    return places[0][1], roles[::-1] if sides != sorted(sides) else roles


def _found(table: Mapping[str, Sequence[str]], text: str) -> list[tuple[int, str]]:
    """Where a phrase of the table stands, and its name, in the order of the text; of overlapping phrases the longest."""
    names = {phrase.lower(): name for name, phrases in table.items() for phrase in phrases}
    longest_first = sorted(names, key=lambda phrase: -len(phrase))
    pattern = rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b"
    return [(match.start(), names[match.group()]) for match in re.finditer(pattern, text)]
