"""The drawn world's training stories are whole, the same for a seed, and say nothing that a caption must not say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastory.builtin.evaluation.classifier import load_classifier
from fastory.builtin.looks import LOOK_WORDS
from fastory.builtin.training.drawn_stories import main
from fastory.builtin.words import SPECIES_WORDS, words
from fastory.builtin.world.drawing import COLOURS, HATS, SCARVES, SIZE
from fastory.tuning.objectives.paired_stories import paired_stories_of
from fastory.tuning.stories import digest_of, read_examples


def test_stories_are_read_as_they_were_written(tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        main([str(tmp_path / name), "--stories", "3", "--frames", "5", "--seed", seed])
    first, again, other = (read_examples(tmp_path / name, (SIZE, SIZE)) for name in "abc")
    assert [len(example.pictures) for example in first] == [5, 5, 5]
    assert digest_of(first) == digest_of(again) != digest_of(other)
    said = {word for example in first for prompt in example.prompts for word in words(prompt)}
    assert not said & {*COLOURS, *HATS, *SCARVES, "hat", "scarf"}


def test_paired_stories_have_the_same_captions_and_places_and_six_colours(tmp_path: Path) -> None:
    main([str(tmp_path / "a"), "--stories", "13", "--frames", "4", "--seed", "5", "--paired", "6"])
    main([str(tmp_path / "b"), "--stories", "3", "--frames", "4", "--seed", "5"])
    examples, alone = (read_examples(tmp_path / name, (SIZE, SIZE)) for name in "ab")
    assert paired_stories_of(examples) == [list(range(6)), list(range(6, 12))]
    assert [examples[n].prompts for n in (0, 6, 12)] == [one.prompts for one in alone]
    assert [examples[n].digest for n in (0, 6, 12)] == [
        one.digest for one in alone
    ]  # the first is the plain story
    for first in (0, 6):
        for frame in range(4):
            pictures = np.stack(
                [np.asarray(Image.open(one.pictures[frame]), np.int64) for one in examples[first : first + 6]]
            )
            same = (np.ptp(pictures, 0) <= (40 if first == 0 else 0)).all(
                -1
            )  # every third went through the autoencoder
            assert same[:16].mean() > 0.5 and 0.4 < same.mean() < 0.98
            assert len({tuple(p[~same].mean(0).round()) for p in pictures}) == 6


def test_more_paired_stories_than_colours_are_refused(tmp_path: Path) -> None:
    for flag, number in (
        ("--paired", "0"),
        ("--paired", "7"),
        ("--siblings", "7"),
    ):  # the last is its old name
        with pytest.raises(SystemExit):
            main([str(tmp_path / "new"), flag, number])
    assert not list(tmp_path.iterdir())


def test_stories_too_short_or_too_long_are_refused(tmp_path: Path) -> None:
    for frames in ("3", "41"):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "new"), "--frames", frames])
    assert not list(tmp_path.iterdir())


def test_what_captions_say_paired_stories_have_in_common_and_no_story_has_a_held_out_look(
    tmp_path: Path,
) -> None:
    """Until a held-out look was left by another colour, a story whose captions say hat and scarf had no end."""
    options = ["--stories", "60", "--frames", "4", "--seed", "41", "--paired", "6", "--said", "1"]
    main([str(tmp_path / "a"), *options])
    examples = read_examples(tmp_path / "a", (SIZE, SIZE))
    classifier = load_classifier()
    for first in range(0, 60, 6):
        assert len({example.prompts for example in examples[first : first + 6]}) == 1
    said = [words(prompt) for example in examples for prompt in example.prompts]
    assert all(
        any(set(LOOK_WORDS) & set(prompt) for prompt in said[n : n + 4]) for n in range(0, len(said), 4)
    )
    for number, example in enumerate(examples):
        for prompt, file in zip(example.prompts, example.pictures, strict=True):
            seen = classifier.see(np.asarray(Image.open(file))[None])
            found = [COLOURS[seen.slots["colour"][0, slot]] for slot in range(1 + int(seen.two[0]))]
            asked = [colour for colour in COLOURS if f" {colour} " in f" {prompt} "]
            assert all(colour in found for colour in asked), (number, prompt, found)


def test_two_of_one_species_have_names(tmp_path: Path) -> None:
    main([str(tmp_path / "a"), "--stories", "12", "--frames", "4", "--seed", "5", "--alike", "1"])
    pairs = 0
    for example in read_examples(tmp_path / "a", (SIZE, SIZE)):
        together = " ".join(example.prompts)
        kinds = [name for name, kind in SPECIES_WORDS.items() if set(kind) & set(words(together))]
        assert len(kinds) == 1
        # A sentence begins with a capital, too: a name is never one of the grammar's own words.
        begin = {"A", "An", "The", "There", "In", "On", "At", "By", "Near", "Among", "Inside"}
        called = [{*re.findall(r"\b[A-Z]\w+", prompt)} - begin for prompt in example.prompts]
        both = [
            sum(word in SPECIES_WORDS[kinds[0]] for word in words(prompt)) > 1 for prompt in example.prompts
        ]
        assert all(len(names) == 2 for names, two in zip(called, both, strict=True) if two)
        pairs += sum(both)
    assert pairs > 8
    with pytest.raises(SystemExit):
        main([str(tmp_path / "b"), "--alike", "1.5"])
