"""What captions say of how a character looks: its body colour, its hat, its scarf. What they do not say stays free."""

from __future__ import annotations

import numpy as np

from fastory.builtin.looks import COLOUR_WORDS, HAT_PHRASES, SCARF_PHRASES
from fastory.builtin.world.drawing import Character

ATTRIBUTES = ("colour", "hat", "scarf")

Said = frozenset[str]
"""Which of the attributes a caption says of a character."""

NOTHING: Said = frozenset()


def sample_said(
    rng: np.random.Generator, cast_size: int, share: float, named: bool = False
) -> tuple[Said, ...]:
    """What one caption says of each member of a cast: something in `share` of the captions, most often the colour.

    named: of two with names not all of a look is said, so that the caption still fits in the text encoder.
    """
    if rng.random() >= share:
        return (NOTHING,) * cast_size
    while True:
        said = tuple(
            frozenset(name for name in ATTRIBUTES if rng.random() < (0.6 if name == "colour" else 0.5))
            for _ in range(cast_size)
        )
        if any(said) and not (named and cast_size > 1 and any(len(look) == 3 for look in said)):
            return said


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[0] if rng.random() < 0.5 else options[rng.integers(len(options))]


def coloured(rng: np.random.Generator, noun: str, character: Character, said: Said) -> str:
    """The noun with the character's body colour before it, where that is said."""
    return f"{_pick(rng, COLOUR_WORDS[character.colour])} {noun}" if "colour" in said else noun


def worn(rng: np.random.Generator, character: Character, said: Said) -> str:
    """' with a crown and a white scarf', in either order; empty where neither is said."""
    phrases = [
        _pick(rng, table[getattr(character, name)])
        for name, table in (("hat", HAT_PHRASES), ("scarf", SCARF_PHRASES))
        if name in said
    ]
    if not phrases:
        return ""
    if len(phrases) == 2 and rng.random() < 0.3:
        phrases.reverse()
    bare = any(phrase.startswith("no ") for phrase in phrases)
    word = "wearing" if not bare and rng.random() < 0.25 else "with"
    return f" {word} {' and '.join(phrases)}"
