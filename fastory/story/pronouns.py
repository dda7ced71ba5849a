"""Pronouns: `he`, `she`, `it`, `they` or `the man` in a caption without a name mean the last fitting characters of the story.

A rule and no language model. The last named character that fits is meant; what a character is, its prompt says. Whoever means
another one names it in the caption, or in the frame's `characters:`, which then are the only ones that can be meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

MAN, WOMAN, THING, SEVERAL = "man", "woman", "thing", "several"
_WORDS = {
    **dict.fromkeys(("he", "him", "his"), MAN),
    **dict.fromkeys(("she", "her", "hers"), WOMAN),
    **dict.fromkeys(("it", "its"), THING),
    **dict.fromkeys(("they", "them", "their", "theirs"), SEVERAL),
}
_OWNERS = {"his", "hers", "its", "their", "theirs"}  # and `her` before what is hers
_MEN = "man boy king prince father dad grandfather grandpa brother son uncle husband gentleman lord knight wizard monk sir"
_WOMEN = "woman girl queen princess mother mum mom grandmother grandma sister daughter aunt wife lady witch nun madam"
_PERSONS = {**dict.fromkeys(_MEN.split(), MAN), **dict.fromkeys(_WOMEN.split(), WOMAN)}
# Whatever has none of these nouns may be a person whose sex is not said: `he` or `she`, and never `it`.
_ANIMALS_AND_THINGS = (
    "animal bear bee bird boat bunny bus butterfly calf camel car cat chick chicken cow crab creature crow deer dinosaur dog "
    "dolphin donkey dragon duck eagle elephant fish fox frog ghost giraffe goat goose hamster hare hedgehog hen horse kitten "
    "lamb lion lizard monkey monster mouse octopus owl panda parrot penguin pig pony puppy rabbit rat raven robot rocket sheep "
    "ship snail snake spaceship spider squirrel swan tiger toy train tree truck turtle unicorn whale wolf"
)
_THINGS = frozenset(_ANIMALS_AND_THINGS.split())
# What a character is ends before these: `an old man with a grey coat` is a man.
_AFTER = r"with|in|on|at|of|who|whose|that|which|wearing|holding|and|from"
# `it` is nobody in: it rains, it is late, it was a cold morning.
_NOBODY = re.compile(
    r"(?:['’]s)?(?:\s+\w+){0,4}?\s+(?:rain|snow|thunder|dark|late|early|night|noon|morning|evening|day|cold|warm|hot|wind|fog|sun|"
    r"spring|summer|autumn|winter|time|midnight)\w*",
    re.IGNORECASE,
)
# `her` is whom it is about, not whose something is, before these and at an end.
_NO_NOUN = re.compile(
    r"\s*(?:[^\w\s]|$)|\s+(?:and|or|to|with|in|on|at|by|from|into|for|as|when|while|because|again|up|down|home|away|there|here|"
    r"back|off|out|over|near|under|behind|before|after|through|across|a|an|the)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Someone:
    """A character as pronouns see it: its name, and its prompt, which may say what it is."""

    name: str
    prompt: str | None = None
    noun: str | None = field(init=False)

    def __post_init__(self) -> None:
        """The noun of `an old man with a grey coat` is `man`."""
        said = re.split(rf"[^\w\s'’-]|\b(?:{_AFTER})\b", self.prompt or "", maxsplit=1)[0].split()
        object.__setattr__(self, "noun", said[-1].lower() if said else None)

    def fits(self, kind: str) -> bool:
        """Whether `he` (MAN), `she` (WOMAN) or `it` (THING) can mean it; of animals all can."""
        person = _PERSONS.get(self.noun or "")
        if kind == THING:
            return self.noun in _THINGS
        return person is None or person == kind


@dataclass(frozen=True)
class Meant:
    """What a word of a caption was understood to mean: names in the order of the story's characters."""

    frame: int
    word: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Spoken:
    """A caption as it is spoken to the model: each character's first pronoun gives way to its name, the others stay."""

    caption: str
    meant: tuple[Meant, ...]


class Listener:
    """Hears a story caption by caption, and keeps of whom it spoke last."""

    def __init__(self, characters: Sequence[Someone]) -> None:
        self._characters = {character.name: character for character in characters}
        self._order = list(self._characters)
        self._recent: list[str] = []  # the last one at the end
        self._together: tuple[str, ...] = ()  # the last ones that one caption had
        self._kinds: dict[str, str] = {}  # who was `he` once is not `she` later
        nouns = {re.escape(c.noun) for c in characters if c.noun}
        words = "|".join([*_WORDS, *(rf"the\s+{noun}" for noun in sorted(nouns))])
        self._pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)

    def hear(self, frame: int, caption: str, named: Sequence[str], listed: Sequence[str]) -> Spoken:
        """What a caption means. named: in it, in the caption's order; listed: in the frame's `characters:`."""
        meant: list[Meant] = []
        spoken = caption
        if not named:
            found = list(self._heard(caption, listed))
            meant = [Meant(frame, match.group(), names) for match, names in found]
            spoken = _with_names(caption, found)
        self._remember([*named, *(name for found in meant for name in found.names), *listed])
        return Spoken(spoken, tuple(meant))

    def _heard(self, caption: str, listed: Sequence[str]) -> Iterator[tuple[re.Match[str], tuple[str, ...]]]:
        taken: dict[str, tuple[str, ...]] = {}  # `he` and `her` of one caption are two
        for match in self._pattern.finditer(caption):
            word = match.group().lower()
            kind = _WORDS.get(word)
            others = {name for other, who in taken.items() if other not in (kind, SEVERAL) for name in who}
            names = taken.get(kind or "") or self._named_by(word, listed, others if kind else set())
            if not names or (word == "it" and _NOBODY.match(caption, match.end())):
                continue
            if kind:
                taken[kind] = names
                if kind in (MAN, WOMAN):
                    self._kinds.setdefault(names[0], kind)
            else:
                self._remember(names)  # `the dog` is whom `his` means behind it
            yield match, names

    def _named_by(self, word: str, listed: Sequence[str], others: set[str]) -> tuple[str, ...]:
        """Whom a word means: the last fitting one, or for `they` the last who were together; nobody where none fits."""
        if _WORDS.get(word) == SEVERAL:
            several = listed or self._together or self._recent[-2:]
            return tuple(name for name in self._order if name in several) if len(several) > 1 else ()
        unheard = [name for name in listed if name not in self._recent]
        for name in reversed([*unheard, *self._recent]):
            character = self._characters[name]
            fits = (
                self._fits(character, _WORDS[word]) if word in _WORDS else character.noun == word.split()[-1]
            )
            if fits and name not in others and (not listed or name in listed):
                return (name,)
        return ()

    def _fits(self, character: Someone, kind: str) -> bool:
        return character.fits(kind) and (kind == THING or self._kinds.get(character.name, kind) == kind)

    def _remember(self, names: Sequence[str]) -> None:
        present = list(dict.fromkeys(names))
        self._recent = [name for name in self._recent if name not in present] + present
        if len(present) > 1:
            self._together = tuple(present)


def _with_names(caption: str, found: Sequence[tuple[re.Match[str], tuple[str, ...]]]) -> str:
    """The caption with names where they are first meant: of whom it speaks, else of whose something is."""
    chosen: dict[tuple[str, ...], tuple[re.Match[str], bool]] = {}
    for match, names in found:
        owner = _is_owner(caption, match)
        if names not in chosen or (chosen[names][1] and not owner):
            chosen[names] = match, owner
    spoken = caption
    for names, (match, owner) in sorted(chosen.items(), key=lambda item: -item[1][0].start()):
        said = _joined(names) + ("'s" if owner else "")
        spoken = spoken[: match.start()] + said + spoken[match.end() :]
    return spoken


def _is_owner(caption: str, match: re.Match[str]) -> bool:
    word = match.group().lower()
    return word in _OWNERS or (word == "her" and not _NO_NOUN.match(caption, match.end()))


def _joined(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def understood(meant: Sequence[Meant]) -> str:
    """One line for the user of all that was understood."""
    said = (f"frame {found.frame}: `{found.word}` is {_joined(found.names)}" for found in meant)
    return f"understood {'; '.join(said)} (--pronouns off, or names in the captions, for another reading)"
