"""Two characters of a frame that see all pictures end alike: each must see its own, where it stands, and nobody else's."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from counted_calls import calls
from drawn_rounds import PAPERS, Kept, Pictures
from PIL import Image

from fastory import InputError, Story, StoryModel, generate
from fastory.builtin import WEIGHTS
from fastory.builtin.looks import COLOUR_WORDS, HAT_PHRASES, SCARF_PHRASES
from fastory.builtin.world.captions import caption, sample_names
from fastory.builtin.world.corpus import sample_tale
from fastory.builtin.world.drawing import draw_with_boxes
from fastory.builtin.world.looks import sample_said
from fastory.conditioning.references import ReferenceContext
from fastory.events import FrameDrawn, Notice
from fastory.models.text import token_places
from fastory.modes.iterative import iterative, prepare_round
from fastory.modes.mode import StoryPlan
from fastory.modes.regions import Regions, Seen, medoids, mentions, settled, without
from fastory.settings import Settings, resolve

STORY = """\
title: Two
characters:
  Ann: {prompt: a rabbit}
  Bob: {prompt: a fox}
frames:
- Ann is sleeping in the snow
- Bob is jumping in the forest
- Ann and Bob are standing on the beach%s
- Bob is standing in the city
- It is standing on the mountain
"""


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def story(folder: Path, boxes: str = "") -> Story:
    text = STORY % ""
    if boxes:
        text = text.replace(
            "- Ann and Bob are standing on the beach",
            f"- {{caption: Ann and Bob are standing on the beach, boxes: {boxes}}}",
        )
    (folder / "two.yaml").write_text(text)
    return Story.read(folder / "two.yaml")


def chosen(model: StoryModel, **values: object) -> Settings:
    given = {**PAPERS, "steps": 2, "iterations": 1, "reference_scale": 0.5, "references": "others", **values}
    return resolve(given, {}, None, model.defaults)[0]


def draw(model: StoryModel, given: Story, kept: Pictures | None = None, **values: object) -> Pictures:
    plan = StoryPlan(given, chosen(model, **values), finished=Kept(kept or {}))
    events = iterative(model, plan, batch_sizes=[2])
    return {(e.round, e.frame): e.image for e in events if isinstance(e, FrameDrawn)}


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.tobytes() == other.tobytes()


def test_the_animals_of_a_plain_story_are_its_characters_in_a_world_whose_words_are_known(
    model: StoryModel, tmp_path: Path
) -> None:
    plain = Story.from_captions(["a fox is jumping", "a bear and a fox are standing"])
    auto, off, on = (draw(model, plain, regions=value) for value in ("auto", "off", "on"))
    assert all(same(auto[key], on[key]) for key in on)
    assert not same(on[1, 1], off[1, 1])
    folder = tmp_path / "weights"
    shutil.copytree(WEIGHTS, folder)
    defaults = json.loads((folder / "fastory_defaults.json").read_text())
    del defaults["world"]
    (folder / "fastory_defaults.json").write_text(json.dumps(defaults))
    unknown = StoryModel.open(str(folder))
    assert settled(unknown, plain, chosen(model), [frame.caption for frame in plain.frames]) == "off"


def test_each_frame_sees_the_pictures_of_its_own_characters_alone(model: StoryModel, tmp_path: Path) -> None:
    """Where all count alike: in a majority a picture decides how much the others of its group count, in its own frame, too."""
    given = story(tmp_path, "{Ann: [0, 0, 0.4, 1], Bob: [0.6, 0, 1, 1]}")
    first = {key: image for key, image in draw(model, given).items() if key[0] == 0}
    as_drawn = draw(model, given, first, reference_weighting="equal")
    for changed, seen_by in ((0, {0, 2, 4}), (1, {1, 2, 3, 4}), (2, {4}), (4, {2})):
        others = {**first, (0, changed): Image.new("RGB", first[0, 0].size, "purple")}
        after = draw(model, given, others, reference_weighting="equal")
        moved = {frame for (_, frame), image in after.items() if not same(image, as_drawn[1, frame])}
        assert moved == seen_by


def test_two_characters_do_not_take_over_all_looks_before_it_is_known_where_they_stand(
    model: StoryModel,
) -> None:
    """With fresh references, in round 0: one that is alone has references already, two in a frame that is new have none."""
    texts = ["a fox is jumping", "a bear is jumping", "a fox and a bear are standing", "a fox is reading"]
    given = Story.from_captions(texts)
    alone, fresh = (draw(model, given, references_from=rule) for rule in ("last", "latest"))
    assert [same(fresh[0, i], alone[0, i]) for i in range(4)] == [True, True, True, False]
    assert not same(fresh[1, 2], alone[1, 2])


def test_two_pictures_of_a_character_do_not_swap_looks_and_three_see_each_other(model: StoryModel) -> None:
    """Under `others` each of two sees the other one alone, and both change into what the other was."""
    for alone, own_too in ((2, True), (3, False)):
        texts = [*["a fox is standing"] * alone, "a fox and a bear are standing"]
        given = Story.from_captions(texts)
        captions = [model.encode_caption(text) for text in texts]
        regions = Regions(model, given, chosen(model), texts, captions, (128, 128))
        last = {i: Seen(torch.zeros(1, 1, 1), {"fox": torch.zeros(1, 1, 1)}) for i in range(alone)}
        fox, *others = regions.groups(1, last)
        assert not others
        assert [fox.sees(0, n) for n in range(alone)] == [own_too, *[True] * (alone - 1)]


def test_a_resumed_story_goes_on_to_the_same_bytes(model: StoryModel, tmp_path: Path) -> None:
    given = story(tmp_path)
    whole = draw(model, given, iterations=2)
    for done in (lambda k, i: k == 0, lambda k, i: k < 2 and (k, i) != (1, 2), lambda k, i: (k, i) != (2, 2)):
        kept = {key: image for key, image in whole.items() if done(*key)}
        rest = draw(model, given, kept, iterations=2)
        assert set(rest) == set(whole) - set(kept)
        assert all(same(image, whole[key]) for key, image in rest.items())


def test_a_picture_of_two_costs_one_more_call_and_one_of_one_none(model: StoryModel, tmp_path: Path) -> None:
    given = story(tmp_path)
    counted = {}
    for value in ("off", "auto"):
        with calls({"unet": model.unet, "image": model.checkpoint.image_encoder}) as count:
            draw(model, given, regions=value)
        counted[value] = (count["unet"], count["image"])
    null = 1 if model.adapter is not None and model.adapter.kind == "plus" else 0
    assert counted["off"][1] == 5 + null
    assert counted["auto"][0] == counted["off"][0] + 1  # where the two of frame 2 are
    assert counted["auto"][1] == counted["off"][1]  # what they look like is known from where they are alone


def test_who_is_never_alone_is_seen_as_it_is_cut_out(model: StoryModel) -> None:
    """Of three characters two are only ever beside each other; the third's whole pictures stay its references."""
    given = Story.from_captions(
        ["a fox and a bear are standing", "a fox and a bear are jumping", "a cat is sleeping"]
    )
    first = draw(model, given, iterations=0)
    regions = Regions(
        model,
        given,
        chosen(model),
        [frame.caption for frame in given.frames],
        [model.encode_caption(frame.caption) for frame in given.frames],
        (128, 128),
    )
    seen = {i: regions.see(i, image, image, torch.zeros(1)) for (_, i), image in first.items()}
    assert {i: set(one.own) for i, one in seen.items()} == {
        0: {"fox", "bear"},
        1: {"fox", "bear"},
        2: {"cat"},
    }
    beside = replace(given, frames=(*given.frames, *Story.from_captions(["a fox is reading"]).frames))
    prompts = [frame.caption for frame in beside.frames]
    known = Regions(
        model, beside, chosen(model), prompts, [model.encode_caption(p) for p in prompts], (128, 128)
    )
    assert set(known.see(0, first[0, 0], first[0, 0], torch.zeros(1)).own) == {"bear"}


def test_boxes_say_where_without_a_call_and_swapped_ones_swap(model: StoryModel, tmp_path: Path) -> None:
    left, right = "[0, 0, 0.5, 1]", "[0.5, 0, 1, 1]"
    one = story(tmp_path, f"{{Ann: {left}, Bob: {right}}}")
    first = {key: image for key, image in draw(model, one).items() if key[0] == 0}
    with calls({"unet": model.unet}) as count:
        drawn = draw(model, one, first)
    with calls({"unet": model.unet}) as plain:
        draw(model, one, first, regions="off")
    assert count == plain
    swapped = draw(model, story(tmp_path, f"{{Ann: {right}, Bob: {left}}}"), first)
    assert not same(drawn[1, 2], swapped[1, 2])
    regions = Regions(model, one, chosen(model), [""] * 5, [], (128, 128))
    places = regions.places(2, {})
    assert torch.allclose(places["Ann"].flip(1), places["Bob"])  # type: ignore[union-attr]
    assert regions.places(0, {}) == {"Ann": None}
    assert regions.places(4, {}) == {}


def test_boxes_hold_words_too_and_from_round_0(model: StoryModel, tmp_path: Path) -> None:
    left, right = "[0, 0, 0.5, 1]", "[0.5, 0, 1, 1]"
    plain = draw(model, story(tmp_path), iterations=0)
    boxed = draw(model, story(tmp_path, f"{{Ann: {left}, Bob: {right}}}"), iterations=0)
    swapped = draw(model, story(tmp_path, f"{{Ann: {right}, Bob: {left}}}"), iterations=0)
    # Frames without boxes differ by no more than what another order of sums does.
    for frame in (0, 1, 3, 4):
        pixels = [np.asarray(one[0, frame]).astype(int) for one in (plain, boxed)]
        assert abs(pixels[0] - pixels[1]).max() <= 1
    assert len({one[0, 2].tobytes() for one in (plain, boxed, swapped)}) == 3


def test_a_box_of_somebody_who_is_not_there_is_refused_with_its_line(
    model: StoryModel, tmp_path: Path
) -> None:
    text = STORY.replace(
        "- Bob is jumping in the forest", "- caption: Bob is jumping\n  boxes:\n    Ann: [0, 0, 1, 1]"
    )
    (tmp_path / "lost.yaml").write_text(text % "")
    with pytest.raises(
        InputError, match=r"lost\.yaml:9: the box of Ann: wanted a character of frame 1"
    ) as error:
        list(generate(Story.read(tmp_path / "lost.yaml"), model=model, steps=1, iterations=1))
    assert "\n" not in str(error.value)


def test_where_regions_decide_nothing_they_are_off(model: StoryModel, tmp_path: Path) -> None:
    given, boxes = story(tmp_path), story(tmp_path, "{Ann: [0, 0, 0.5, 1]}")
    prompts = [given.prompt(i) for i in range(5)]
    alone = replace(given, frames=given.frames[:1])
    plain = Story.from_captions(prompts)

    def of(one: Story, settings: Settings) -> str:
        return settled(model, one, settings, [one.prompt(i) for i in range(len(one.frames))])

    assert of(given, chosen(model)) == "auto"
    assert of(given, chosen(model, references="all")) == "off"
    assert of(boxes, chosen(model, references="all")) == "auto"
    assert of(given, chosen(model, iterations=0)) == "off"
    assert of(given, chosen(model, regions="off")) == of(boxes, chosen(model, regions="off")) == "off"
    assert of(alone, chosen(model)) == "off"
    assert of(plain, chosen(model)) == "auto" and of(plain, chosen(model, regions="on")) == "on"
    assert of(plain, chosen(model, references="all")) == "off"
    assert "regions" not in chosen(model, regions="off").identity()  # a run folder of before goes on
    assert chosen(model).identity()["regions"] == "auto"


def test_regions_that_are_asked_for_in_vain_are_told(model: StoryModel) -> None:
    events = generate(Story.from_captions(["a fox"]), model=model, steps=1, iterations=1, regions="on")
    assert any("`regions` are off" in event.message for event in events if isinstance(event, Notice))


def test_the_tokens_of_a_character_are_its_name_and_description(model: StoryModel, tmp_path: Path) -> None:
    given = story(tmp_path)
    prompt = given.prompt(2)
    spans: dict[str, list[tuple[int, int]]] = {}
    for name, first, end in given.spans(prompt):
        spans.setdefault(name, []).append((first, end))
    assert {name: [prompt[a:b] for a, b in found] for name, found in spans.items()} == {
        "Ann": ["Ann, a rabbit"],
        "Bob": ["Bob, a fox"],
    }
    places = token_places(model.tokenizer, prompt, spans)
    ids = model.tokenizer(prompt).input_ids
    said = {name: model.tokenizer.decode([ids[i] for i in found]).split() for name, found in places.items()}
    assert said["Ann"][-2:] == ["a", "rabbit"] and said["Bob"][-2:] == ["a", "fox"]
    assert not set(places["Ann"]) & set(places["Bob"])


def test_the_words_of_an_animal_are_all_that_is_said_of_its_look() -> None:
    """A colour, hat or scarf that is nobody's reaches everybody. Of captions with and without names in them."""
    phrases = {"colour": COLOUR_WORDS, "hat": HAT_PHRASES, "scarf": SCARF_PHRASES}
    said_of = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        tale = sample_tale(rng, 4, 2)
        said, names = sample_said(rng, 2, 1.0, named=True), sample_names(rng, 2)
        for scene in tale.scenes:
            text = caption(rng, tale.cast, scene, names, said)
            found = mentions(Story.from_captions([text]), 0, text, plain=True)
            assert set(found) == {tale.cast[role.member].species for role in scene.roles}
            left = without(text, [span for spans in found.values() for span in spans])
            for role in scene.roles:
                character = tale.cast[role.member]
                own = " ".join(text[first:end] for first, end in found[character.species])
                for name in said[role.member]:
                    said_of += 1
                    assert any(phrase in own for phrase in phrases[name][getattr(character, name)]), text
            every = [word for table in phrases.values() for options in table.values() for word in options]
            assert not any(re.search(rf"\b{word}\b", left) for word in every), (text, left)
    assert said_of > 500


@pytest.mark.parametrize(("family", "kind"), [("sd15", "base"), ("sdxl", "plus")])
def test_characters_are_looked_for_in_both_families(
    family: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, adapter = (
        request.getfixturevalue(name) for name in (f"{family}_folder", f"{family}_adapter_{kind}")
    )
    checkpoint = StoryModel.open(str(folder), ip_adapter=str(adapter))
    given = story(tmp_path)
    settings = replace(chosen(checkpoint), width=None, height=None)
    prompts = [given.prompt(i) for i in range(5)]
    captions = [checkpoint.encode_caption(prompt) for prompt in prompts]
    regions = Regions(checkpoint, given, settings, prompts, captions, checkpoint.native_size)
    picture = Image.effect_noise(checkpoint.native_size, 60).convert("RGB")
    found = regions.see(2, picture, picture, checkpoint.encode_reference(picture)).masks
    assert set(found) == {"Ann", "Bob"}
    assert all(mask.min() >= 0 and mask.max() <= 1 for mask in found.values())
    assert sum(mask.sum() for mask in found.values()) > 0  # a UNet of noise may give all to one of them


def test_medoids_stand_for_all() -> None:
    """Two looks, one of them rare: two medoids are one of each, one is the frequent look's."""
    generator = torch.Generator().manual_seed(0)
    looks = torch.eye(8)[[0, 0, 3, 0, 0, 0]] + 0.05 * torch.randn(6, 8, generator=generator)
    tokens = list(looks[:, None, None].flatten(1, 2)[:, None])
    assert medoids(tokens, 1)[0] != 2
    assert 2 in medoids(tokens, 2) and len(medoids(tokens, 2)) == 2
    assert medoids(tokens, 6) == list(range(6))
    assert medoids([tokens[0]] * 4, 3) == [0, 1, 2]  # equal ones are not taken twice


def test_a_limit_keeps_that_many_references_of_a_character(model: StoryModel, tmp_path: Path) -> None:
    given = story(tmp_path, "{Ann: [0, 0, 0.5, 1], Bob: [0.5, 0, 1, 1]}")
    given = replace(given, frames=(*given.frames, given.frames[0], given.frames[0]))
    first = draw(model, given, iterations=0)
    found = {}
    for limit in (0, 1, 2):
        settings = chosen(model, cast_limit=limit)
        sampler, _ = prepare_round(model, StoryPlan(given, settings, finished=Kept(first)), 1, 2)
        context = sampler.context
        assert isinstance(context, ReferenceContext)
        # Each group ends with its null block.
        found[limit] = (context.ref_offsets.diff() // context.tokens_per_ref - 1).tolist()
    assert found == {0: [7, 3, 2], 1: [7, 1, 1], 2: [7, 2, 2]}


def overlaps(model: StoryModel, seeds: Sequence[int]) -> np.ndarray:
    """Of found masks on drawn pictures: the share in the character's own box, and in the other's alone."""
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        tale = sample_tale(rng, 8, 2)
        for scene in [one for one in tale.scenes if len(one.roles) == 2][:2]:
            text = caption(rng, tale.cast, scene)
            picture, boxes = draw_with_boxes(tale.cast, scene, rng)
            plain, settings = Story.from_captions([text]), chosen(model, regions="on")
            regions = Regions(model, plain, settings, [text], [model.encode_caption(text)], (128, 128))
            seen: Seen = regions.see(0, picture, picture, torch.zeros(1))
            truth = [regions.grid.box(box) for box in boxes]
            for slot, role in enumerate(scene.roles):
                mask = seen.masks[tale.cast[role.member].species]
                own, other = truth[slot], truth[1 - slot] * (1 - truth[slot])
                rows.append([float((mask * one).sum() / mask.sum()) for one in (own, other)])
    return np.array(rows)


def test_characters_are_found_where_they_are_drawn(model: StoryModel) -> None:
    own, other = overlaps(model, range(20)).mean(0)
    assert own > 0.75
    assert other < 0.06


def test_a_copy_of_the_built_in_model_knows_its_animals_and_its_words(tmp_path: Path) -> None:
    copied = tmp_path / "trained-anew"
    shutil.copytree(WEIGHTS, copied)
    plain = Story.from_captions(["a fox and a bear are standing", "a wolf and a bear are standing"])
    events = generate(plain, model=str(copied), steps=1, iterations=1, regions="on")
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert any("wolf" in text for text in notices) and not any("regions" in text for text in notices)
