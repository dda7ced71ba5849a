"""Captions of the drawn world: a small grammar with variety."""

from __future__ import annotations

import re

import numpy as np

from fastory.builtin.words import (
    ACTION_PHRASES,
    ACTION_VERBS,
    FILLERS,
    NAMES,
    PLACE_PHRASES,
    SPECIES_WORDS,
    vocabulary,
)
from fastory.builtin.world.drawing import Character, Scene
from fastory.builtin.world.looks import NOTHING, Said, coloured, worn

TOKEN_LIMIT = 40
NAMED = 0.35  # of the stories: their characters have names

_SYLLABLES = (
    "ba",
    "do",
    "fi",
    "ga",
    "ki",
    "la",
    "mo",
    "ne",
    "pa",
    "ri",
    "so",
    "tu",
    "vi",
    "wa",
    "ze",
    "lin",
    "ras",
)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """The first option half of the time: it is what most people write."""
    return options[0] if rng.random() < 0.5 else options[rng.integers(len(options))]


def sample_name(rng: np.random.Generator) -> str:
    """A first name; one in four is made up, so that names outside the vocabulary are not strange to the model."""
    if rng.random() < 0.75:
        return NAMES[rng.integers(len(NAMES))]
    return "".join(_SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=2)).capitalize()


def _subject(rng: np.random.Generator, character: Character, name: str | None, said: Said) -> str:
    noun = coloured(rng, _pick(rng, SPECIES_WORDS[character.species]), character, said)
    if rng.random() < 0.15:
        noun = f"{FILLERS[rng.integers(len(FILLERS))]} {noun}"
    article = "an" if noun[0] in "aeiou" else "a"
    wears = worn(rng, character, said)
    if name is None:
        return f"the {noun}{wears}" if rng.random() < 0.25 else f"{article} {noun}{wears}"
    # The first form is what a named character's prompt becomes in a story file.
    forms = (
        f"{name}, {article} {noun}{wears},",
        f"{name} the {noun}{wears}",
        f"the {noun} {name}{wears}",
        f"{article} {noun}{wears} named {name}",
    )
    return _pick(rng, forms)


def described(rng: np.random.Generator, character: Character, said: Said = NOTHING) -> str:
    """Who a character is, as a story file's prompt says it: 'a rabbit', 'a red rabbit with a crown'."""
    noun = coloured(rng, character.species, character, said)
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}{worn(rng, character, said)}"


def _clause(rng: np.random.Generator, subject: str, action: str) -> str:
    if rng.random() < 0.2:
        return f"{subject} {_pick(rng, ACTION_VERBS[action])}"
    return f"{subject} is {_pick(rng, ACTION_PHRASES[action])}"


def _ordered(rng: np.random.Generator, text: str, place: str) -> str:
    if rng.random() < 0.15:
        return f"{place}, {text}"
    return f"{text} {place}"


def caption(
    rng: np.random.Generator,
    cast: tuple[Character, ...],
    scene: Scene,
    names: tuple[str | None, ...] | None = None,
    said: tuple[Said, ...] | None = None,
    described: bool = True,
) -> str:
    """A sentence for a scene: species, place and action, who is on the left first.

    names: one per member of the cast, None for none; without names every character is called by its species. said:
    which attributes of each member the sentence tells; none unless given. It is told in other words where it would be
    longer than the text encoder reads. described: whether the species of one with a name is told; not where the `characters`
    of a story file tell it. Raises ValueError if no words are found that fit.
    """
    names, said = names or (None,) * len(cast), said or (NOTHING,) * len(cast)
    for _ in range(2000):
        sentence = _sentence(rng, cast, scene, names, said, described)
        if not any(said) or longest_count(sentence) <= TOKEN_LIMIT:
            return sentence
    raise ValueError(f"a caption of {names} that says {said} does not fit in {TOKEN_LIMIT} tokens")


def longest_count(sentence: str) -> int:
    """The most tokens that a sentence can have, start and end among them: a made-up name falls into letters."""
    parts = re.findall(r"[^\W\d_]+|[^\w\s]", sentence.lower())
    return 2 + sum(len(p) if p[0].isalpha() and p not in vocabulary() else 1 for p in parts)


def _sentence(
    rng: np.random.Generator,
    cast: tuple[Character, ...],
    scene: Scene,
    names: tuple[str | None, ...],
    said: tuple[Said, ...],
    described: bool,
) -> str:
    place = _pick(rng, PLACE_PHRASES[scene.place])
    who = [(cast[role.member], names[role.member], said[role.member]) for role in scene.roles]
    subjects = [name if name and not described else _subject(rng, body, name, say) for body, name, say in who]
    actions = [role.action for role in scene.roles]
    if len(subjects) == 1:
        text = f"there is {subjects[0]} {place}" if actions == ["standing"] and rng.random() < 0.1 else ""
        text = text or _ordered(rng, _clause(rng, subjects[0], actions[0]), place)
    elif actions[0] == actions[1] and rng.random() < 0.7:
        both = f"{subjects[0]} and {subjects[1]} are {_pick(rng, ACTION_PHRASES[actions[0]])}"
        text = _ordered(rng, both, place)
    else:
        text = _ordered(rng, _two_clauses(rng, subjects, actions), place)
    sentence = re.sub(r",(\s*)(?=$)", "", text)
    sentence = sentence[0].upper() + sentence[1:]
    return sentence + "." if rng.random() < 0.7 else sentence


def _two_clauses(rng: np.random.Generator, subjects: list[str], actions: list[str]) -> str:
    choice = rng.random()
    if choice < 0.1:
        sides = [
            f"{subject} on the {side}" for subject, side in zip(subjects, ("left", "right"), strict=True)
        ]
        first, second = (_clause(rng, side, action) for side, action in zip(sides, actions, strict=True))
        if rng.random() < 0.5:
            first, second = second, first
        return f"{first} and {second}"
    joint = "and" if choice < 0.8 else "while"
    first, second = (_clause(rng, subject, action) for subject, action in zip(subjects, actions, strict=True))
    return f"{first} {joint} {second}"


def sample_names(rng: np.random.Generator, cast_size: int, share: float = NAMED) -> tuple[str | None, ...]:
    """Names for a cast: in a `share` of the stories, and then for everyone, all different."""
    if rng.random() > share:
        return (None,) * cast_size
    names: list[str | None] = []
    while len(names) < cast_size:
        name = sample_name(rng)
        if name not in names:
            names.append(name)
    return tuple(names)
