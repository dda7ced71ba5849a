"""Captions that leak a free attribute, fall apart into letters or lose their end would spoil training unseen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from transformers import CLIPTokenizer

from fastory.builtin import WEIGHTS
from fastory.builtin.looks import COLOUR_WORDS, HAT_PHRASES, SCARF_PHRASES
from fastory.builtin.training.tokenizer import build_tokenizer, grown_tokenizer
from fastory.builtin.words import (
    known_to,
    look_notice,
    unknown_words,
    vocabulary,
    vocabulary_lines,
    words,
)
from fastory.builtin.world.captions import TOKEN_LIMIT, caption, sample_names
from fastory.builtin.world.corpus import sample_training_tale
from fastory.builtin.world.drawing import (
    ACTIONS,
    COLOURS,
    HATS,
    PLACES,
    SCARVES,
    SPECIES,
    Character,
    Role,
    Scene,
)
from fastory.builtin.world.looks import ATTRIBUTES, sample_said


def captions(count: int, named: bool = True, said: float = 0.0) -> Iterator[str]:
    rng = np.random.default_rng(1)
    for _ in range(count):
        tale = sample_training_tale(rng, 4)
        names = sample_names(rng, len(tale.cast)) if named else (None,) * len(tale.cast)
        for scene in tale.scenes:
            told = sample_said(rng, len(tale.cast), said, any(names)) if said else None
            yield caption(rng, tale.cast, scene, names, told)


@pytest.fixture(scope="module")
def shipped() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True)


def test_a_caption_that_says_no_look_mentions_none() -> None:
    secret = {*COLOURS, *HATS, *SCARVES, "hat", "scarf", "colour", "color"} - {"none"}
    for text in captions(300):
        assert not secret & set(words(text)), text


def test_every_word_of_the_grammar_is_one_token() -> None:
    tokenizer = build_tokenizer()
    split = [word for word in vocabulary() if len(tokenizer(word)["input_ids"]) != 3]
    assert not split


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_caption_says_of_each_character_what_it_is_told_to_and_no_more(attribute: str) -> None:
    """What is said is beside the character's own word, with the words of its own value."""
    tables = {"colour": COLOUR_WORDS, "hat": HAT_PHRASES, "scarf": SCARF_PHRASES}
    cast = (Character("fox", "red", "cone", "white"), Character("bear", "gray", "none", "orange"))
    scene = Scene("snow", (Role(0, "flag"), Role(1, "book")))
    rng = np.random.default_rng(0)
    for member, character in enumerate(cast):
        said = tuple(frozenset({attribute} if one == member else ()) for one in range(2))
        other = cast[1 - member]
        for _ in range(100):
            text = caption(rng, cast, scene, said=said).lower()
            assert any(p in text for p in tables[attribute][getattr(character, attribute)]), text
            assert not any(p in text for p in tables[attribute][getattr(other, attribute)]), text
            assert not any(
                p in text
                for name in set(tables) - {attribute}
                for one in cast
                for p in tables[name][getattr(one, name)]
                if p != "gray" or "gray" in text.split()
            ), text


def test_half_of_the_captions_say_something_when_half_are_asked_to() -> None:
    rng = np.random.default_rng(0)
    shares = [any(sample_said(rng, 2, 0.5)) for _ in range(2000)]
    assert 0.46 < np.mean(shares) < 0.54
    assert all(len(one) < 3 for _ in range(300) for one in sample_said(rng, 2, 1.0, named=True))


def test_captions_use_only_the_vocabulary() -> None:
    for text in (*captions(300, named=False), *captions(300, named=False, said=1.0)):
        assert not unknown_words(text)


@pytest.mark.parametrize("grown", [False, True], ids=["fresh", "grown"])
@pytest.mark.parametrize("said", [0.0, 1.0])
def test_no_caption_is_longer_than_the_text_encoder_reads(
    said: float, grown: bool, shipped: CLIPTokenizer
) -> None:
    tokenizer = grown_tokenizer(shipped) if grown else build_tokenizer()
    longest = max(captions(600, said=said), key=lambda text: len(tokenizer(text)["input_ids"]))
    assert len(tokenizer(longest)["input_ids"]) <= TOKEN_LIMIT, longest


def test_a_strange_word_keeps_its_letters() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("Xylqz")["input_ids"]
    assert str(tokenizer.decode(ids, skip_special_tokens=True)).strip() == "xylqz"


def test_the_same_scene_is_told_in_many_ways() -> None:
    cast = (Character("fox", "red", "none", "none"), Character("bear", "blue", "none", "none"))
    scene = Scene("snow", (Role(0, "flag"), Role(1, "book")))
    rng = np.random.default_rng(0)
    assert len({caption(rng, cast, scene) for _ in range(100)}) > 50


def test_left_comes_first_unless_the_side_is_named() -> None:
    cast = (Character("fox", "red", "none", "none"), Character("bear", "blue", "none", "none"))
    scene = Scene("snow", (Role(1, "flag"), Role(0, "book")))
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = caption(rng, cast, scene).lower()
        bear = min(text.find(word) for word in ("bear", "cub") if word in text)
        fox = min(text.find(word) for word in ("fox", "vixen") if word in text)
        assert bear < fox or "on the left" in text, text


@pytest.mark.parametrize(
    ("word", "near"), [("rabit", "rabbit"), ("forrest", "forest"), ("slepping", "sleeping")]
)
def test_an_unknown_word_brings_its_nearest_known_ones(word: str, near: str) -> None:
    (found,) = unknown_words(f"A {word}, a {word}.")
    assert found.word == word
    assert near in found.suggestions
    assert near in str(found)


def test_given_names_are_known_words() -> None:
    assert not unknown_words("Kunigunde is reading a book.", {"Kunigunde": "a bear"})


def test_words_that_the_shipped_weights_do_not_know_are_told(shipped: CLIPTokenizer) -> None:
    """Weights may be older than the grammar: what their tokenizer splits, they have not learned."""
    assert not unknown_words("A fox is jumping in the snow.", tokenizer=shipped)
    split = [word for word in vocabulary() if len(shipped.tokenize(word)) > 1]
    assert {found.word for found in unknown_words(" ".join(split), tokenizer=shipped)} == set(split)
    assert [found.word for found in unknown_words("A zebra.", tokenizer=shipped)] == ["zebra"]


def test_the_words_that_are_printed_are_those_of_the_weights_in_use(shipped: CLIPTokenizer) -> None:
    titles = {"animals", "places", "actions", "looks", "colour", "scarf", "other", "words", "names"}
    titles |= {"connecting", "not", "drawn", "others", "if", "characters", "lists", "them", *ACTIONS, *PLACES}
    known = known_to(shipped.tokenize)
    for trained, every in ((known, True), (vocabulary(), True), (known - {"fox", "ball", "hat"}, False)):
        listed = "\n".join(vocabulary_lines(trained)).partition("\nexamples:")[0].split("\n\n", 1)[1]
        printed = set(words(listed)) - (titles - trained) - {*SPECIES, "hat"}
        assert printed <= trained
        assert not every or printed >= trained - {*SPECIES, "hat"}
    assert ("looks" in "\n".join(vocabulary_lines(known))) == ("red" in known)


def test_new_words_get_ids_behind_the_old_ones(shipped: CLIPTokenizer) -> None:
    """A UNet has learned to read the old ids; a vocabulary without some words stands for an older model."""
    grown = grown_tokenizer(shipped)
    for word in known_to(shipped.tokenize):
        assert grown(word)["input_ids"] == shipped(word)["input_ids"]
    assert known_to(grown.tokenize) == vocabulary()
    new = {i for w in vocabulary() - known_to(shipped.tokenize) for i in grown(w)["input_ids"]}
    new -= {grown.bos_token_id, grown.eos_token_id}
    assert all(len(shipped) <= i < len(grown) for i in new)
    assert grown("Xylqz")["input_ids"] == shipped("Xylqz")["input_ids"]


def test_a_garment_that_the_world_does_not_have_is_told() -> None:
    assert look_notice("A bear with a red hat is reading.") == (
        "the built-in model does not draw 'red hat': it has a party hat, a top hat or a crown"
    )
    asked = (
        "Mia with a green crown, a teal scarf, a blue scarf and a hat; no hat, a top hat, the golden crown"
    )
    assert [word for word in look_notice(asked).split("'") if word in asked] == [
        "green crown",
        "blue scarf",
        "a hat",
    ]
    for text in captions(200, named=False, said=1.0):
        assert not look_notice(text), text


def test_an_unknown_garment_is_told_once_as_an_unknown_word(shipped: CLIPTokenizer) -> None:
    unknown = {one.word for one in unknown_words("A bear with a straw hat.", tokenizer=shipped)}
    assert "straw" in unknown
    assert not look_notice("A bear with a straw hat.", tokenizer=shipped)
