"""Finding the names of characters in captions: whole words, in any case, the longest first.

One regular expression of all names would try each of them at every word. Here the names lie sorted, so that a search by
halves finds the few that can stand at a place, and the regular expression of such a name alone decides.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence

START = re.compile(r"(?<!\w)(?=.)", re.DOTALL)


class Names:
    """Names to be found in many texts. Of equal ones the first counts; an empty one is never found."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._indices: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            if name:
                self._indices.setdefault(name.translate(_folded), []).append(index)
        self._sorted = sorted(self._indices)
        self._shorter = _longest_beginnings(self._sorted)
        self._longest = max(map(len, self._sorted), default=0)
        self._patterns: dict[int, re.Pattern[str]] = {}

    def find(self, text: str) -> Iterator[tuple[int, re.Match[str]]]:
        """The index of each name in `text`, from left to right, and where it stands, with its 's if it has one."""
        if not self._sorted:
            return
        folded, end = text.translate(_folded), 0
        for start in START.finditer(text):
            if start.start() >= end and (found := self._find_at(text, folded, start.start())):
                end = found[1].end()
                yield found

    def _find_at(self, text: str, folded: str, start: int) -> tuple[int, re.Match[str]] | None:
        here = folded[start : start + self._longest]
        # In sorted order, what begins `here` is the name before it or a beginning of that name.
        at = bisect_right(self._sorted, here) - 1
        while at >= 0:
            name = self._sorted[at]
            if here.startswith(name):
                for index in self._indices[name]:
                    if match := self._pattern(index).match(text, start):
                        return index, match
            at = self._shorter[at]
        return None

    def _pattern(self, index: int) -> re.Pattern[str]:
        if index not in self._patterns:
            # `Ann's` is Ann, and no prompt may come between the two parts of the word
            self._patterns[index] = re.compile(
                rf"{re.escape(self._names[index])}(?:['’]s)?(?!\w)", re.IGNORECASE
            )
        return self._patterns[index]


def _longest_beginnings(names: Sequence[str]) -> list[int]:
    """For each of the sorted `names` the index of the longest other one that it begins with, or -1."""
    places: list[int] = []
    open_: list[int] = []
    for index, name in enumerate(names):
        while open_ and not name.startswith(names[open_[-1]]):
            open_.pop()
        places.append(open_[-1] if open_ else -1)
        open_.append(index)
    return places


class _Folded(dict[int, str]):
    """A letter for each letter: the same one for those that a regular expression takes for equal in any case.

    Others may share one too, such as e and é: what is found with it is only looked at more closely.
    """

    def __missing__(self, code: int) -> str:
        letter = unicodedata.normalize("NFKD", chr(code).lower().upper())[0].lower()[0]
        self[code] = letter
        return letter


_folded = _Folded()
