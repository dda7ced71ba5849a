"""Captions that leak a free attribute, fall apart into letters or lose their end would spoil training unseen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from transformers import CLIPTokenizer

from fastory.builtin import WEIGHTS
from fastory.builtin.training.tokenizer import build_tokenizer
from fastory.builtin.words import unknown_words, vocabulary, words
from fastory.builtin.world.captions import TOKEN_LIMIT, caption, sample_names
from fastory.builtin.world.corpus import sample_training_tale
from fastory.builtin.world.drawing import COLOURS, HATS, SCARVES, Character, Role, Scene


def captions(count: int, named: bool = True) -> Iterator[str]:
    rng = np.random.default_rng(1)
    for _ in range(count):
        tale = sample_training_tale(rng, 4)
        names = sample_names(rng, len(tale.cast)) if named else None
        for scene in tale.scenes:
            yield caption(rng, tale.cast, scene, names)


def test_captions_never_mention_free_attributes() -> None:
    secret = {*COLOURS, *HATS, *SCARVES, "hat", "scarf", "colour", "color"} - {"none"}
    for text in captions(300):
        assert not secret & set(words(text)), text


def test_every_word_of_the_grammar_is_one_token() -> None:
    tokenizer = build_tokenizer()
    split = [word for word in vocabulary() if len(tokenizer(word)["input_ids"]) != 3]
    assert not split


def test_captions_use_only_the_vocabulary() -> None:
    for text in captions(300, named=False):
        assert not unknown_words(text)


def test_no_caption_is_longer_than_the_text_encoder_reads() -> None:
    tokenizer = build_tokenizer()
    longest = max(captions(600), key=lambda text: len(tokenizer(text)["input_ids"]))
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


def test_words_that_the_shipped_weights_do_not_know_are_told() -> None:
    """Weights may be older than the grammar: what their tokenizer splits, they have not learned."""
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True)
    assert not unknown_words("A fox is jumping in the snow.", tokenizer=tokenizer)
    split = [word for word in vocabulary() if len(tokenizer.tokenize(word)) > 1]
    assert {found.word for found in unknown_words(" ".join(split), tokenizer=tokenizer)} == set(split)
    assert [found.word for found in unknown_words("A zebra.", tokenizer=tokenizer)] == ["zebra"]
