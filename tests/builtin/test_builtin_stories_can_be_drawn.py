"""The bundled stories are what a first run draws: they must parse and use words that the model knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from fastory import Story
from fastory.builtin import DEFAULT_EXAMPLE, EXAMPLES, WEIGHTS
from fastory.builtin.words import unknown_words


@pytest.mark.parametrize("file", EXAMPLES.values(), ids=EXAMPLES)
def test_captions_are_within_the_vocabulary(file: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True)
    story = Story.read(file)
    names = {character.name: character.prompt or "" for character in story.characters}
    for i in range(len(story.frames)):
        assert not unknown_words(story.prompt(i), names)
        assert not unknown_words(story.prompt(i), names, tokenizer)


@pytest.mark.parametrize("file", EXAMPLES.values(), ids=EXAMPLES)
def test_captions_fit_the_shipped_text_encoder(file: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True)
    story = Story.read(file)
    for i in range(len(story.frames)):
        text = story.prompt(i)
        assert len(tokenizer(text)["input_ids"]) <= tokenizer.model_max_length, text


def test_there_is_a_short_one_a_long_one_and_one_with_two_names() -> None:
    stories = {name: Story.read(file) for name, file in EXAMPLES.items()}
    assert len(stories) == 3
    assert len(stories[DEFAULT_EXAMPLE].frames) == 8
    assert max(len(story.frames) for story in stories.values()) == 24
    assert max(len(story.characters) for story in stories.values()) == 2
