"""A control that does not move what it says it moves proves nothing: named stories, boxes, where whose references reach."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastory import Story, StoryModel, draw
from fastory.builtin.evaluation import held_out
from fastory.builtin.evaluation.characters import (
    Misplaced,
    as_story,
    drawn_boxes,
    looks_in_frames_of_two,
    of_another_frame,
    swapped,
)
from fastory.builtin.evaluation.iterative import (
    HeldOutStory,
    Judged,
    draw_with_foreign_references,
    held_out_stories,
)
from fastory.builtin.looks import COLOUR_WORDS, HAT_PHRASES, SCARF_PHRASES
from fastory.builtin.training.encoders import label
from fastory.builtin.world.captions import TOKEN_LIMIT, longest_count
from fastory.modes.regions import Regions, Seen
from fastory.settings import resolve

FREE = ("colour", "hat", "scarf")


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def perfectly_seen(story: HeldOutStory) -> Judged:
    labels = [label(story.tale, scene) for scene in story.tale.scenes]
    slots = np.maximum(np.stack([one.slots for one in labels]), 0)
    two = np.array([len(scene.roles) == 2 for scene in story.tale.scenes])
    place = np.array([one.place for one in labels])
    free = {name: slots[:, :, 2 + column] for column, name in enumerate(FREE)}
    return Judged(story, two, place, slots[:, :, 0], slots[:, :, 1], free)


@pytest.mark.parametrize("cast", ["two", "alike"])
def test_a_named_story_says_who_everybody_is_in_every_frame(cast: str) -> None:
    for held in held_out_stories(8, seed=3, cast=cast, named=True):
        story, species = as_story(held), [character.species for character in held.tale.cast]
        assert (species[0] == species[1]) == (cast == "alike")
        for i, scene in enumerate(held.tale.scenes):
            names = [held.names[role.member] for role in scene.roles]
            assert story.cast(i) == set(names)
            for name, role in zip(names, scene.roles, strict=True):
                assert f"{name}, a {species[role.member]}" in story.prompt(i)
            assert not any(word in held.captions[i] for word in species)


@pytest.mark.parametrize("cast", ["mixed", "alike"])
def test_prompts_say_in_every_frame_what_is_measured(cast: str) -> None:
    """A look that is counted as said but stands in no prompt would be held against the model."""
    phrases = {"colour": COLOUR_WORDS, "hat": HAT_PHRASES, "scarf": SCARF_PHRASES}
    for held in held_out_stories(8, seed=3, cast=cast, said=1.0, named=True):
        story = as_story(held)
        assert any(held.said[0]) and held.said == (held.said[0],) * len(held.captions)
        for i, scene in enumerate(held.tale.scenes):
            assert longest_count(story.prompt(i)) <= TOKEN_LIMIT
            for role in scene.roles:
                character, prompt = held.tale.cast[role.member], held.prompts[role.member]
                assert prompt in story.prompt(i) and character.species in prompt
                for name, table in phrases.items():
                    value = getattr(character, name)
                    assert any(p in prompt for p in table[value]) == (name in held.said[i][role.member])


def test_stories_without_names_are_what_they_were() -> None:
    """Figures of earlier weights are of these captions."""
    assert [story.captions[0] for story in held_out_stories(2, seed=1)] == [
        "The bear is jumping by the sea.",
        "The kitten and a turtle are sleeping in the house",
    ]


def test_a_file_of_named_stories_is_read_with_its_boxes(tmp_path: Path) -> None:
    file = tmp_path / "held.jsonl"
    asked = ["--stories", "2", "--seed", "3", "--cast", "alike", "--named", "--boxes"]
    held_out.main([*asked, "--output", str(file)])
    for line, held in zip(
        file.read_text().splitlines(), held_out_stories(2, 3, cast="alike", named=True), strict=True
    ):
        one = tmp_path / "one.json"
        one.write_text(json.dumps({"version": 1, **json.loads(line)}))
        assert Story.read(one).frames == as_story(held, boxes=True).frames
        for scene, placed in zip(held.tale.scenes, drawn_boxes(held), strict=True):
            assert [name for name, _ in placed] == [held.names[role.member] for role in scene.roles]
            lefts = [box[0] for _, box in placed]
            assert lefts == sorted(lefts)


@pytest.mark.parametrize("asked", [["--boxes"], ["--cast", "alike"]])
def test_what_wants_names_is_refused_without(asked: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        held_out.main([*asked, "--output", str(tmp_path / "held.jsonl")])
    assert ended.value.code == 2 and not list(tmp_path.iterdir())


def test_characters_that_took_each_others_looks_show_the_others() -> None:
    (held,) = held_out_stories(1, seed=3, cast="alike", named=True)
    true = perfectly_seen(held)
    assert looks_in_frames_of_two(true, true) == {"own look": 1.0, "the other's": 0.0}
    exchanged = {
        name: np.where(true.two[:, None], values[:, ::-1], values) for name, values in true.free.items()
    }
    found = looks_in_frames_of_two(true, replace(true, free=exchanged))
    assert found == {"own look": 0.0, "the other's": 1.0}


def test_swapped_masks_move_where_references_reach_and_nothing_else(model: StoryModel) -> None:
    held = next(
        story
        for story in held_out_stories(8, seed=3, cast="two", named=True)
        if len(story.tale.scenes[0].roles) == 2
    )
    settings, _ = resolve({"iterations": 1}, {}, None, model.defaults)
    story = as_story(held)
    prompts = [story.prompt(i) for i in range(len(story.frames))]
    own = Regions(model, story, settings, prompts, [], (128, 128))
    left, right = torch.zeros(2, own.grid.height, own.grid.width)
    left[:, :8], right[:, 8:] = 1, 1
    last = {}
    for i, scene in enumerate(held.tale.scenes):
        names = [held.names[role.member] for role in scene.roles]
        masks = dict(zip(names, (left, right), strict=True)) if len(names) == 2 else {}
        last[i] = Seen(torch.zeros(1, 1, 1), dict.fromkeys(names, torch.zeros(1, 1, 1)), masks)

    def reach(regions: Regions) -> list[torch.Tensor | None]:
        return [regions.rest(0, last), *(group.mask(0) for group in regions.groups(1, last))]

    as_is, exchanged, elsewhere = map(reach, (own, Misplaced(own, swapped), Misplaced(own, of_another_frame)))
    assert len(as_is) == 3
    torch.testing.assert_close(exchanged[0], as_is[0])  # what nobody has is the same
    assert torch.equal(exchanged[1], as_is[2]) and torch.equal(exchanged[2], as_is[1])
    later = next(seen.masks for i, seen in last.items() if i and seen.masks)
    assert torch.equal(elsewhere[1], later[own.names[0]])


def test_another_story_s_pictures_are_all_that_the_control_shows(model: StoryModel) -> None:
    """The first frame and the last, which would see fresh ones by the model's own rule, are what these pictures alone make."""
    (held,) = held_out_stories(1, seed=3)
    _, last = model.defaults["iterative"]["reference_scale"]
    alone = {"iterations": 1, "references": "all", "references_from": "last", "reference_scale": (last, last)}
    pictures = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), dtype=np.uint8)
    given = list(map(Image.fromarray, pictures))
    wanted = draw(held.captions, model=model, seed=held.seed, batch_size=4, initial_pictures=given, **alone)
    found = draw_with_foreign_references(model, held, pictures)
    assert np.array_equal(found, np.stack([np.asarray(image) for image in wanted.images]))
