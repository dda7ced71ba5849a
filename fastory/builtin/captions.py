"""Captions of the drawn world: a small grammar with variety, its vocabulary, and the words it does not know."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fastory.wording import counted

if TYPE_CHECKING:  # `fastory words` imports neither
    import numpy as np
    from transformers import CLIPTokenizer

    from fastory.builtin.world import Character, Scene

TOKEN_LIMIT = 40

SPECIES_WORDS: dict[str, tuple[str, ...]] = {
    "rabbit": ("rabbit", "bunny", "hare"),
    "turtle": ("turtle", "tortoise"),
    "fox": ("fox", "vixen"),
    "penguin": ("penguin",),
    "bear": ("bear", "cub"),
    "cat": ("cat", "kitten"),
}
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "forest": ("in the forest", "in the woods", "among the trees", "in a forest"),
    "snow": ("in the snow", "in the winter snow", "on the snow"),
    "beach": ("on the beach", "at the beach", "by the sea", "on a beach"),
    "house": ("in the house", "at home", "inside the house", "in the room"),
    "city": ("in the night city", "in the city", "in the city at night", "in the dark city"),
    "mountain": ("on the mountain", "in the mountains", "near the mountain", "on a mountain"),
}
# After "is"; and as a verb of its own.
ACTION_PHRASES: dict[str, tuple[str, ...]] = {
    "standing": ("standing", "waiting", "standing still"),
    "jumping": ("jumping", "leaping", "jumping up", "jumping for joy"),
    "sleeping": ("sleeping", "asleep", "napping", "taking a nap"),
    "flag": ("holding a flag", "waving a flag", "carrying a flag", "holding the flag"),
    "ball": ("playing with a ball", "playing ball", "playing with the ball"),
    "book": ("reading a book", "reading", "reading the book", "holding a book"),
}
ACTION_VERBS: dict[str, tuple[str, ...]] = {
    "standing": ("stands", "waits"),
    "jumping": ("jumps", "leaps"),
    "sleeping": ("sleeps", "naps", "takes a nap"),
    "flag": ("holds a flag", "waves a flag", "carries a flag"),
    "ball": ("plays with a ball", "plays ball"),
    "book": ("reads a book", "reads"),
}
NAMES = (
    *("Anna", "Bella", "Bruno", "Carla", "Clara", "Coco", "Dora", "Emil", "Emma", "Felix", "Fiona", "Finn"),
    *("George", "Greta", "Hugo", "Ida", "Jack", "Juno", "Kira", "Leo", "Lily", "Lucy", "Luna", "Max"),
    *("Mia", "Milo", "Nina", "Noah", "Olga", "Oscar", "Otto", "Paul", "Penny", "Pip", "Pipa", "Robin"),
    *("Rosa", "Ruby", "Sam", "Sophie", "Theo", "Tilda", "Tim", "Toby", "Tom", "Vera", "Willy", "Zoe"),
)
# Words that carry no picture: a user may write them, and training sees them.
FILLERS = ("little", "small", "big", "happy", "young", "friendly", "brave")
GRAMMAR_WORDS = (
    *(
        "a",
        "an",
        "the",
        "is",
        "are",
        "and",
        "while",
        "both",
        "there",
        "named",
        "called",
        "left",
        "right",
        "on",
    ),
    *("it", "he", "she", "they", "now", "then", "today", "with", "in", "at", "picture", "of"),
)

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


def _subject(rng: np.random.Generator, character: Character, name: str | None) -> str:
    noun = _pick(rng, SPECIES_WORDS[character.species])
    if rng.random() < 0.15:
        noun = f"{FILLERS[rng.integers(len(FILLERS))]} {noun}"
    article = "an" if noun[0] in "aeiou" else "a"
    if name is None:
        return f"the {noun}" if rng.random() < 0.25 else f"{article} {noun}"
    # The first form is what a named character's prompt becomes in a story file.
    forms = (
        f"{name}, {article} {noun},",
        f"{name} the {noun}",
        f"the {noun} {name}",
        f"{article} {noun} named {name}",
    )
    return _pick(rng, forms)


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
) -> str:
    """A sentence for a scene: species, place and action, who is on the left first, free attributes never.

    names: one per member of the cast, None for none; without names every character is called by its species.
    """
    names = names or (None,) * len(cast)
    place = _pick(rng, PLACE_PHRASES[scene.place])
    subjects = [_subject(rng, cast[role.member], names[role.member]) for role in scene.roles]
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


def sample_names(rng: np.random.Generator, cast_size: int) -> tuple[str | None, ...]:
    """Names for a cast: in a third of the stories, and then for everyone, all different."""
    if rng.random() > 0.35:
        return (None,) * cast_size
    names: list[str | None] = []
    while len(names) < cast_size:
        name = sample_name(rng)
        if name not in names:
            names.append(name)
    return tuple(names)


def words(text: str) -> list[str]:
    """The words of a caption, lower case, without punctuation and digits."""
    return re.findall(r"[^\W\d_]+", text.lower())


@cache
def vocabulary() -> frozenset[str]:
    """Every word of the grammar, names included, lower case."""
    phrases = [
        phrase
        for table in (PLACE_PHRASES, ACTION_PHRASES, ACTION_VERBS)
        for p in table.values()
        for phrase in p
    ]
    nouns = [word for options in SPECIES_WORDS.values() for word in options]
    return frozenset(w for text in (*phrases, *nouns, *NAMES, *FILLERS, *GRAMMAR_WORDS) for w in words(text))


@dataclass(frozen=True)
class UnknownWord:
    """A word that the model was not trained on, and the nearest ones that it was."""

    word: str
    suggestions: tuple[str, ...]

    def __str__(self) -> str:
        hint = f"; known words near it: {', '.join(self.suggestions)}" if self.suggestions else ""
        return f"the built-in model does not know {self.word!r}{hint}"


def unknown_words(
    text: str, names: Mapping[str, str] | None = None, tokenizer: CLIPTokenizer | None = None
) -> list[UnknownWord]:
    """The words of a caption that the model was not trained on, each once; the keys of `names` count as known.

    tokenizer: of the weights in use, where they may have been trained on fewer words than this grammar has: a word
    that it splits is unknown.
    """
    trained = [w for w in sorted(vocabulary()) if tokenizer is None or len(tokenizer.tokenize(w)) == 1]
    known = {*trained, *(word for name in names or {} for word in words(name))}
    strange = dict.fromkeys(word for word in words(text) if word not in known)
    return [UnknownWord(w, tuple(difflib.get_close_matches(w, trained, n=3, cutoff=0.6))) for w in strange]


MOST_NAMED = 8  # unknown words in a notice
EXAMPLES = (
    "A rabbit is reading a book in the forest.",
    "Mia the fox and a penguin are playing with a ball on the beach.",
    "A bear is sleeping in the house while a cat waves a flag.",
)


def notice_of(unknown: Sequence[UnknownWord]) -> str:
    """One line for a story's unknown words: which they are, what the model can draw, and what draws anything."""
    named = [
        f"{one.word[:30]} ({one.suggestions[0]}?)" if one.suggestions else one.word[:30]
        for one in unknown[:MOST_NAMED]
    ]
    more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
    animals = ", ".join(SPECIES_WORDS)
    actions = ", ".join(phrases[0] for phrases in ACTION_PHRASES.values())
    places = ", ".join(PLACE_PHRASES)
    return (
        f"the built-in model does not know {counted(len(unknown), 'word')} of this story: {', '.join(named)}{more}. It draws "
        f"six animals ({animals}) in six places ({places}), {actions}; `fastory words` prints all its words. A checkpoint "
        "(--model) draws anything"
    )


def vocabulary_lines() -> Iterator[str]:
    """What the model was trained on, for people: animals, places, actions, connecting words, names and examples."""
    yield "The built-in model knows these words and no others; a checkpoint (--model) takes any English."
    yield from _section("animals", ((name, ", ".join(options)) for name, options in SPECIES_WORDS.items()))
    yield from _section("places", ((name, ", ".join(options)) for name, options in PLACE_PHRASES.items()))
    verbs = ((name, ", ".join((*ACTION_PHRASES[name], *ACTION_VERBS[name]))) for name in ACTION_PHRASES)
    yield from _section("actions", verbs)
    connecting, fillers = ", ".join(dict.fromkeys(GRAMMAR_WORDS)), ", ".join(FILLERS)
    yield from _section("other words", (("connecting", connecting), ("not drawn", fillers)))
    yield from _section("names", (("", ", ".join(NAMES) + "; others, if `characters:` lists them"),))
    yield "\nexamples: one or two animals, what each does, and where"
    yield from (f"  {sentence}" for sentence in EXAMPLES)


def _section(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f"\n{title}"
    yield from (f"  {name:<11}{said}" if name else f"  {said}" for name, said in rows)
