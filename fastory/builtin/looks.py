"""The words for how a character looks, and what a caption asks for that the drawn world does not have."""

from __future__ import annotations

import re
from collections.abc import Iterator

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple",),
    "gray": ("gray", "grey"),
}
HAT_PHRASES: dict[str, tuple[str, ...]] = {
    "none": ("no hat",),
    "cone": ("a party hat", "a pointed hat"),
    "tophat": ("a top hat", "a black hat"),
    "crown": ("a crown", "a golden crown"),
}
SCARF_PHRASES: dict[str, tuple[str, ...]] = {
    "none": ("no scarf",),
    "orange": ("an orange scarf",),
    "turquoise": ("a turquoise scarf", "a teal scarf"),
    "white": ("a white scarf",),
}
LOOK_WORDS = ("with", "wearing")
_GARMENTS = {"hat": HAT_PHRASES, "crown": {"crown": HAT_PHRASES["crown"]}, "scarf": SCARF_PHRASES}
_KINDS = {
    garment: {p.split()[-2] for phrases in table.values() for p in phrases if p.split()[-1] == garment}
    for garment, table in _GARMENTS.items()
}


def drawable(garment: str) -> str:
    """'a party hat, a top hat or a crown': what the world has of a `hat`, `crown` or `scarf`."""
    table = SCARF_PHRASES if garment == "scarf" else HAT_PHRASES
    *first, last = (phrases[0] for kind, phrases in table.items() if kind != "none")
    return f"{', '.join(first)} or {last}"


def undrawn_looks(text: str) -> Iterator[tuple[str, str]]:
    """(what a caption asks for, what the world has instead) of a hat, crown or scarf that it does not have: 'red hat'.

    A garment without a kind ('a hat', 'her scarf') is one too: which one is drawn is not said.
    """
    found = re.findall(r"(?:([^\W\d_]+)\s+)?\b(hat|crown|scarf)\b", text.lower())
    for kind, garment in dict.fromkeys(found):
        if kind not in _KINDS[garment]:
            yield f"{kind} {garment}".strip(), drawable(garment)
