"""Texts on pictures: Pillow's own font, so that the same text gives the same bytes on every machine; lines, and what fits."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator

from PIL import ImageFont


def inside(size: tuple[int, int], cell: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same proportions that fits into a cell, in px."""
    scale = min(cell[0] / size[0], cell[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


@functools.cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, at `size` px."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("wanted Pillow with FreeType for the contact sheet: install Pillow from a wheel")
    # Raqm is there on some machines only; the sheet must not differ between them
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _drawable(character: str) -> str:
    """The character, or its nearest letters, or an ellipsis: Pillow's font knows little more than ASCII."""
    missing = bytes(font_of(16).getmask("\uffff"))
    if unicodedata.category(character) == "Pd":
        return "-"
    for form in (character, unicodedata.normalize("NFKD", character), character.casefold()):
        drawable = [c for c in form if bytes(font_of(16).getmask(c)) != missing]
        if drawable:
            return "".join(drawable)
    return "" if unicodedata.category(character) in ("Mn", "Cf") else "…"


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, limit: int) -> list[str]:
    """Lines of at most `width` px; where the text needs more than `limit`, the last one ends in an ellipsis."""
    drawable = re.sub("…+", "…", "".join(map(_drawable, text)))
    lines = [""]
    for word in drawable.split(" "):
        for part in _parts(word, font, width):
            longer = f"{lines[-1]} {part}" if lines[-1] else part
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(part)
        if len(lines) > limit:
            last = lines[limit - 1]
            while last and font.getlength(last + "…") > width:
                last = last[:-1]
            return [*lines[: limit - 1], last.rstrip(" .,…") + "…"]
    return lines


def _parts(word: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """A word cut where it is wider than a line."""
    part = ""
    for character in word:
        if part and font.getlength(part + character) > width:
            yield part
            part = ""
        part += character
    yield part
