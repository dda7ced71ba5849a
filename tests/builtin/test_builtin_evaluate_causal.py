"""Figures of causal mode's consistency: counted against a character's first appearance, beside stories without a history."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from small_history import config, encoder

from fastory import Settings, StoryModel
from fastory.builtin.evaluation.causal import (
    WITHOUT,
    by_frame,
    causal_scores,
    differences,
    drawn_world,
    folder_of,
    frames_alone,
    main,
    parse,
    with_first_frame,
    with_history,
    without_history,
)
from fastory.builtin.evaluation.iterative import HeldOutStory, Judged, held_out_stories
from fastory.builtin.training.encoders import label
from fastory.builtin.world.drawing import Character, Role, Scene, Tale
from fastory.sampling.noise import noise_seed
from fastory.settings import resolve

CAST = (Character("fox", "red", "crown", "white"), Character("bear", "blue", "none", "orange"))
SETTINGS = Settings(mode="causal", steps=2, guidance_scale=3.0, noise="per-frame", window=2)


def story_of(members: Sequence[Sequence[int]]) -> HeldOutStory:
    """A story with these members of the cast in its frames, from left to right."""
    scenes = [Scene("snow", tuple(Role(member, "standing") for member in frame)) for frame in members]
    cast = CAST[: 1 + max(member for frame in members for member in frame)]
    return HeldOutStory(Tale(cast, tuple(scenes)), ("a fox",) * len(scenes), 7)


def seen(story: HeldOutStory, wrong: Sequence[tuple[int, int]] = ()) -> Judged:
    """What a perfect judge sees in perfect pictures, but for another colour at these (frame, slot)."""
    labels = [label(story.tale, scene) for scene in story.tale.scenes]
    slots = np.maximum(np.stack([one.slots for one in labels]), 0)
    for frame, slot in wrong:
        slots[frame, slot, 2] = 5  # gray
    free = dict(zip(("colour", "hat", "scarf"), np.moveaxis(slots[:, :, 2:], -1, 0), strict=True))
    two = np.array([len(scene.roles) == 2 for scene in story.tale.scenes])
    return Judged(story, two, np.array([one.place for one in labels]), slots[:, :, 0], slots[:, :, 1], free)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StoryModel:
    """The built-in model with a history of six frames that changes its pictures."""
    return StoryModel.open("builtin", adapter=str(write_adapter(tmp_path_factory.mktemp("adapter"))))


def write_adapter(folder: Path) -> Path:
    base = StoryModel.open("builtin")
    sizes = config(base.cross_attention_dim, len(base.pipeline.tokenizer))
    tensors = {f"history.{name}": tensor for name, tensor in encoder(sizes).state_dict().items()}
    save_file(tensors, folder / "history.safetensors", {"history": json.dumps(sizes.as_dict())})
    return folder / "history.safetensors"


def test_a_character_is_held_against_its_first_appearance_and_not_frame_0() -> None:
    story = story_of([[0], [0], [1], [0, 1], [1]])
    assert causal_scores(seen(story))["first colour"] == 1.0
    # The bear first appears in frame 2: a gray one there disagrees with both later ones, the fox's two frames agree.
    assert causal_scores(seen(story, [(2, 0)]))["first colour"] == pytest.approx(2 / 4)
    # A wrong last appearance is one of the four; the most frequent value would be none the wiser than the first one.
    assert causal_scores(seen(story, [(4, 0)]))["first colour"] == pytest.approx(3 / 4)


def test_a_first_value_that_never_comes_back_is_no_agreement_although_the_others_agree() -> None:
    found = causal_scores(seen(story_of([[0]] * 4), [(0, 0)]))
    assert found["first colour"] == 0.0
    assert found["colour"] == 0.75


def test_each_of_two_characters_is_looked_for_on_its_side() -> None:
    judged = seen(story_of([[0, 1], [1, 0], [0], [1]]))
    assert causal_scores(judged)["first colour, two characters"] == 1.0
    exchanged = {name: values.copy() for name, values in judged.free.items()}
    exchanged["colour"][1] = exchanged["colour"][1][::-1]
    assert causal_scores(replace(judged, free=exchanged))["first colour"] == pytest.approx(2 / 4)


def test_stories_count_for_their_number_of_characters_and_a_single_appearance_for_nothing() -> None:
    alone = causal_scores(seen(story_of([[0]] * 4)))
    assert alone["first hat, one character"] == 1.0
    assert "first hat, two characters" not in alone
    once = causal_scores(seen(story_of([[0], [1]])))
    assert not any(name.startswith("first") for name in once)


def test_agreement_by_frame_tells_where_a_story_drifts() -> None:
    one, other = seen(story_of([[0]] * 4), [(3, 0)]), seen(story_of([[0], [0], [1], [1]]), [(2, 0)])
    assert by_frame([one, other], "colour") == [1.0, 1.0, 0.0]
    assert by_frame([other], "colour") == [1.0, None, 0.0]


def test_differences_are_between_the_same_stories() -> None:
    found = differences(
        [{"place": 0.5, "colour": 1.0}, {"place": 0.75}], [{"place": 0.75, "colour": 0.0}, {"place": 1.0}]
    )
    assert found == {"place": (-0.25, -0.25, -0.25)}


def test_without_history_no_frame_knows_of_another(model: StoryModel) -> None:
    story = held_out_stories(2, 1, 4)[1]
    first, second = story.captions[:2]
    changed = replace(story, captions=("a cat is sleeping in the snow", *story.captions[1:]))
    alone, beside = (without_history(model, SETTINGS, [one])[0] for one in (story, changed))
    assert (alone[1:] == beside[1:]).all()
    told, otherwise = (with_history(model, SETTINGS, [one])[0] for one in (story, changed))
    assert (told[1] != otherwise[1]).any()
    assert first != second


def test_without_history_a_frame_has_the_noise_and_the_unet_of_its_story(model: StoryModel) -> None:
    stories = held_out_stories(2, 1, 4)
    frames = [story.frames[0] for story in frames_alone(stories, SETTINGS)]
    assert [frame.seed for frame in frames[4:]] == [
        noise_seed(None, stories[1].seed, "per-frame", i) for i in range(4)
    ]
    alone = without_history(model, SETTINGS, stories)
    told = with_history(model, SETTINGS, stories)
    for one, other in zip(alone, told, strict=True):
        # The ring's empty places may change the rounding, and nothing else.
        assert np.abs(one[0].astype(int) - other[0]).max() <= 1
        assert np.abs(one[1].astype(int) - other[1]).max() > 1


def test_a_story_is_told_with_its_own_seed_whatever_stands_beside_it(model: StoryModel) -> None:
    stories = held_out_stories(3, 1, 4)
    together = with_history(model, SETTINGS, stories)
    alone = with_history(model, SETTINGS, stories[2:])
    assert (together[2] == alone[0]).all()


def test_a_given_first_frame_is_the_true_picture_and_the_rest_goes_on_from_it(model: StoryModel) -> None:
    story = held_out_stories(1, 1, 4)
    given, told = with_first_frame(model, SETTINGS, story), with_history(model, SETTINGS, story)
    assert np.array_equal(given[0][0], drawn_world(model, SETTINGS, story)[0][0])
    assert not np.array_equal(given[0][1], told[0][1])


@pytest.mark.slow
def test_windows_beyond_the_time_embeddings_are_said_and_the_rest_is_drawn_once(
    model: StoryModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(write_adapter(tmp_path))
    given = ["--stories", "1", "--frames", "8", "--windows", "1,all", "--steps", "1", "--adapter", adapter]
    main([*given, "--output", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["time embeddings"] == 6
    assert "8 frames need 7" in report["ways"]["window all"]["not drawn"]
    assert set(report["ways"]) == {*WITHOUT, "window 1", "window all", "first frame given"}
    assert all(
        min(report["ways"][name]["seconds a story"]) > 0 for name in ("round 0", "no history", "window 1")
    )
    assert report["ways"]["window 1"]["difference to round 0"]["place"][0] <= 0
    assert str(tmp_path) not in json.dumps(report)
    strips = {file: file.read_bytes() for file in tmp_path.glob("out/pictures/*/*.png")}
    assert len(strips) == 5
    lost = next(file for file in strips if "window-1" in str(file))
    lost.unlink()
    main([*given, "--output", str(tmp_path / "out")])
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert lost.read_bytes() == strips[lost]
    assert again["ways"]["round 0"]["seconds a story"] is None
    assert again["ways"]["window 1"]["seconds a story"][0] > 0
    assert again["ways"]["window 1"]["scores"] == report["ways"]["window 1"]["scores"]
    assert "not drawn" in capsys.readouterr().out


def test_pictures_of_other_settings_are_not_taken_for_these(model: StoryModel) -> None:
    options = parse(["--frames", "8"])
    base = folder_of(Path("x"), "round 0", model, SETTINGS, options)
    others = [
        folder_of(Path("x"), "round 0", model, replace(SETTINGS, steps=3), options),
        folder_of(Path("x"), "round 0", model, SETTINGS, parse(["--frames", "9"])),
        folder_of(Path("x"), "round 0", model, SETTINGS, parse(["--frames", "8", "--seed", "2"])),
        folder_of(Path("x"), "round 0", StoryModel.open("builtin"), SETTINGS, options),
    ]
    assert base not in others


def test_evaluation_takes_the_settings_that_the_model_ships(model: StoryModel) -> None:
    shipped, _ = resolve({"mode": "causal"}, {}, None, model.defaults)
    assert shipped.noise == "per-frame"  # else the frames of a story would agree by their noise


def test_windows_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--windows", "0"], ["--windows", "1,x"], ["--frames", "3"], ["--stories", "0"]):
        with pytest.raises(SystemExit):
            parse(given)
    assert "window" in capsys.readouterr().err
    assert parse(["--windows", "1,all"]).windows == [1, "all"]
