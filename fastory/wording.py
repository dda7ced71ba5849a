"""How values and numbers stand in messages: one line, of bounded length, whatever they hold."""

from __future__ import annotations

from collections.abc import Iterable

MOST_LETTERS = 60


def counted(count: int, noun: str) -> str:
    """'1 frame', '2 frames', '1 story', '2 stories'."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"


def numbers_listed(numbers: Iterable[int]) -> str:
    """'3,7,8', as --frames takes them."""
    return ",".join(str(number) for number in numbers)


def shown(value: object, most: int = MOST_LETTERS) -> str:
    """A value as Python writes it, cut after `most` letters. Python refuses to write numbers of thousands of digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a huge number"
    if isinstance(value, str):
        return repr(value) if len(value) <= most else f"{value[:most]!r}…"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # such a number inside a list
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}…"


def last_words(error: BaseException, most: int = 300) -> str:
    """'<type>: <last line of its text>' of what a library raised; most of their texts end with what is the matter."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    last = lines[-1] if len(lines[-1]) <= most else f"{lines[-1][:most]}…"
    return f"{type(error).__name__}: {last}"
