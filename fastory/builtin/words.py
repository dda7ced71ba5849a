"""The vocabulary of the built-in model, and what its user is told of words that it does not know."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fastory.builtin.looks import (
    COLOUR_WORDS,
    HAT_PHRASES,
    LOOK_WORDS,
    SCARF_PHRASES,
    undrawn_looks,
)
from fastory.wording import counted

if TYPE_CHECKING:  # `fastory words` imports no transformers
    from transformers import CLIPTokenizer

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


def words(text: str) -> list[str]:
    """The words of a caption, lower case, without punctuation and digits."""
    return re.findall(r"[^\W\d_]+", text.lower())


@cache
def vocabulary() -> frozenset[str]:
    """Every word of the grammar, names included, lower case."""
    phrases = [
        phrase
        for table in (PLACE_PHRASES, ACTION_PHRASES, ACTION_VERBS, COLOUR_WORDS, HAT_PHRASES, SCARF_PHRASES)
        for p in table.values()
        for phrase in p
    ]
    nouns = [word for options in SPECIES_WORDS.values() for word in options]
    return frozenset(
        w for text in (*phrases, *nouns, *NAMES, *FILLERS, *GRAMMAR_WORDS, *LOOK_WORDS) for w in words(text)
    )


def known_to(tokenize: Callable[[str], Sequence[str]]) -> frozenset[str]:
    """The words of the grammar that a tokenizer has whole: those that the weights beside it were trained on."""
    return frozenset(word for word in vocabulary() if len(tokenize(word)) == 1)


@cache
def animals(species: str) -> re.Pattern[str]:
    """An animal in a caption with what is said of its look: `red fox`, `fox Mia with a crown and no scarf`."""
    colours = "|".join(word for options in COLOUR_WORDS.values() for word in options)
    phrases = [
        phrase for table in (HAT_PHRASES, SCARF_PHRASES) for options in table.values() for phrase in options
    ]
    garment = rf"(?:{'|'.join(sorted(phrases, key=len, reverse=True))})\b"
    worn = rf"(?:(?-i:\s+[A-Z]\w*)?\s+(?:{'|'.join(LOOK_WORDS)})\s+{garment}(?:\s+and\s+{garment})?)?"
    return re.compile(
        rf"\b(?:(?:{colours})\s+)?(?:{'|'.join(SPECIES_WORDS[species])})\b{worn}", re.IGNORECASE
    )


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
    trained = sorted(vocabulary() if tokenizer is None else known_to(tokenizer.tokenize))
    known = {*trained, *(word for name in names or {} for word in words(name))}
    strange = dict.fromkeys(word for word in words(text) if word not in known)
    return [UnknownWord(w, tuple(difflib.get_close_matches(w, trained, n=3, cutoff=0.6))) for w in strange]


def look_notice(
    text: str, names: Mapping[str, str] | None = None, tokenizer: CLIPTokenizer | None = None
) -> str:
    """One line for garments that a story asks for and the world does not have ('a red hat'); empty where there is none.

    Where the weights in use do not know a word of it, the word is told as unknown and no more.
    """
    strange = {unknown_word.word for unknown_word in unknown_words(text, names, tokenizer)}
    undrawn = [(look, has) for look, has in undrawn_looks(text) if not strange & set(words(look))]
    return (
        "the built-in model does not draw "
        + "; ".join(f"{look!r}: it has {has}" for look, has in undrawn[:MOST_NAMED])
        if undrawn
        else ""
    )


MOST_NAMED = 8  # unknown words in a notice
EXAMPLES = (
    "A rabbit is reading a book in the forest.",
    "Mia the fox and a penguin are playing with a ball on the beach.",
    "A bear is sleeping in the house while a cat waves a flag.",
)


def notice_of(unknown: Sequence[UnknownWord]) -> str:
    """One line for a story's unknown words: which they are, what the model can draw, and what draws anything."""
    named = [
        f"{unknown_word.word[:30]} ({unknown_word.suggestions[0]}?)"
        if unknown_word.suggestions
        else unknown_word.word[:30]
        for unknown_word in unknown[:MOST_NAMED]
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


def vocabulary_lines(trained: Container[str] | None = None) -> Iterator[str]:
    """What the model was trained on, for people: animals, places, actions, looks, connecting words, names and examples.

    trained: the words of the grammar that the weights in use know, all of them unless given; a phrase with another word
    is left out.
    """
    trained = vocabulary() if trained is None else trained

    def known(phrases: Iterable[str]) -> str:
        return ", ".join(p for p in dict.fromkeys(phrases) if all(word in trained for word in words(p)))

    yield "The built-in model knows these words and no others; a checkpoint (--model) takes any English."
    yield from _section("animals", ((name, known(options)) for name, options in SPECIES_WORDS.items()))
    yield from _section("places", ((name, known(options)) for name, options in PLACE_PHRASES.items()))
    verbs = ((name, known((*ACTION_PHRASES[name], *ACTION_VERBS[name]))) for name in ACTION_PHRASES)
    yield from _section("actions", verbs)
    looks = (("colour", COLOUR_WORDS), ("hat", HAT_PHRASES), ("scarf", SCARF_PHRASES))
    yield from _section("looks", ((n, known(p for ps in table.values() for p in ps)) for n, table in looks))
    connecting = known((*GRAMMAR_WORDS, *LOOK_WORDS))
    yield from _section("other words", (("connecting", connecting), ("not drawn", known(FILLERS))))
    yield from _section("names", (("", known(NAMES) + "; others, if `characters:` lists them"),))
    yield "\nexamples: one or two animals, what each does, and where"
    yield from (f"  {sentence}" for sentence in EXAMPLES)


def _section(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    if filled := [(name, said) for name, said in rows if said]:
        yield f"\n{title}"
        yield from (f"  {name:<11}{said}" if name else f"  {said}" for name, said in filled)
