"""A program gives pictures, settings and a callback as objects and gets pictures back: the same as from files and flags."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastory import Character, Settings, Story, StoryModel, draw, generate
from fastory.errors import InputError
from fastory.events import Event, FrameDrawn, StoryFinished, StoryStarted

CAPTIONS = ["a fox is sleeping in the snow", "a fox is jumping in the forest"]
SHORT: dict[str, Any] = {"steps": 2, "iterations": 1}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


@pytest.fixture
def picture() -> Image.Image:
    """An animal's place holder whose fit and colours count: not square, transparent in part."""
    image = Image.linear_gradient("L").convert("RGBA").resize((96, 80))
    image.paste((200, 40, 20, 255), (20, 10, 70, 60))
    return image


def bytes_of(events: Iterator[Event]) -> dict[tuple[int, int], bytes]:
    return {(e.round, e.frame): e.image.tobytes() for e in events if isinstance(e, FrameDrawn)}


def story_of(reference: object) -> Story:
    return Story.from_captions(CAPTIONS, characters=[Character("fox", references=reference)])  # type: ignore[arg-type]


def test_a_reference_in_memory_draws_what_its_file_draws(
    model: StoryModel, picture: Image.Image, tmp_path: Path
) -> None:
    picture.convert("RGB").save(tmp_path / "fox.png")
    from_file = bytes_of(generate(story_of([tmp_path / "fox.png"]), model=model, **SHORT))
    assert bytes_of(generate(story_of(picture), model=model, **SHORT)) == from_file
    fox = Character("FOX", references=(picture,))
    assert bytes_of(generate(CAPTIONS, model=model, characters=[fox], **SHORT)) == from_file
    assert bytes_of(generate(CAPTIONS, model=model, **SHORT)) != from_file


def test_a_first_frame_in_memory_is_drawn_on_as_its_file_is(
    model: StoryModel, picture: Image.Image, tmp_path: Path
) -> None:
    picture.convert("RGB").save(tmp_path / "first.png")
    causal: dict[str, Any] = {"mode": "causal", "steps": 2}
    drawn = [
        bytes_of(generate(CAPTIONS, model=model, first_frame=first, **causal))
        for first in (tmp_path / "first.png", str(tmp_path / "first.png"), picture)
    ]
    assert drawn[0] == drawn[1] == drawn[2] != bytes_of(generate(CAPTIONS, model=model, **causal))


def test_a_run_folder_keeps_what_was_in_memory(
    model: StoryModel, picture: Image.Image, tmp_path: Path
) -> None:
    run, story = tmp_path / "run", story_of(picture)
    list(generate(story, model=model, output=run, **SHORT))
    (kept,) = (run / "inputs").iterdir()
    read = Story.read(run / "story.yaml")
    assert read.digest() == story.digest() and read.characters[0].references == (kept.resolve(),)
    for again in (read, story):  # from the folder's own file, and from memory
        events = list(generate(again, model=model, output=run, **SHORT))
        assert not bytes_of(iter(events)) and isinstance(events[-1], StoryFinished)
    whole = kept.read_bytes()
    kept.write_bytes(b"damaged")
    list(generate(story, model=model, output=run, **SHORT))
    assert kept.read_bytes() == whole
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    with pytest.raises(InputError, match=r"holds another run\. What differs: the story's characters"):
        generate(story_of(other), model=model, output=run, **SHORT)
    list(generate(story_of(other), model=model, output=run, overwrite=True, **SHORT))
    assert [file.name for file in (run / "inputs").iterdir()] != [kept.name] and not kept.exists()
    list(generate(CAPTIONS, model=model, output=run, overwrite=True, **SHORT))
    assert not (run / "inputs").exists()


def test_a_given_picture_never_takes_a_strangers_place(
    model: StoryModel, picture: Image.Image, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    list(generate(CAPTIONS, model=model, output=run, **SHORT))
    (name,) = (kept.name for kept in story_of(picture).inputs())
    (run / "inputs").mkdir()
    (run / name).write_bytes(b"mine")
    with pytest.raises(InputError, match="is in the way"):
        generate(story_of(picture), model=model, output=run, overwrite=True, **SHORT)
    assert (run / name).read_bytes() == b"mine"


@pytest.mark.parametrize("given", [7, [7], None, b"png", [["a.png"]]])
def test_what_is_no_picture_is_refused(given: object, model: StoryModel) -> None:
    with pytest.raises(InputError, match=r"wanted (a path|paths) or"):
        story_of(given)
    if given is not None:
        with pytest.raises(
            InputError, match=r"first.frame: a picture: wanted a path or a PIL picture, got a"
        ):
            generate(CAPTIONS, model=model, first_frame=given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("character", "wanted"),
    [
        (Character(""), "wanted a text"),
        (Character("x" * 201), "a name of at most 200 letters"),
        (Character("fox", scale=-1.0), "characters.fox.scale: wanted a finite number from 0 on"),
        (Character("fox", prompt=3), "characters.fox.prompt: wanted a text, got the number 3"),  # type: ignore[arg-type]
        (Character("fox", references=Path("no.png")), "no.png: wanted a picture"),  # type: ignore[arg-type]
    ],
)
def test_a_character_is_checked_as_a_files_is(character: Character, wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        Story.from_captions(CAPTIONS, characters=[character])


def test_a_character_of_the_same_name_takes_the_other_s_place(picture: Image.Image) -> None:
    story = story_of(picture).with_characters([Character("Fox", prompt="a red fox"), Character("bear")])
    assert [(c.name, c.prompt, len(c.references)) for c in story.characters] == [
        ("Fox", "a red fox", 0),
        ("bear", None, 0),
    ]


# -- settings


def test_settings_as_an_object_are_settings_by_name(model: StoryModel) -> None:
    settings = Settings(
        iterations=1, steps=2, guidance_scale=2.0, noise="per-frame", references="others", seed=5
    )
    named = {"guidance_scale": 2.0, "noise": "per-frame", "references": "others", "seed": 5}
    by_name = bytes_of(generate(CAPTIONS, model=model, preset="paper", **SHORT, **named))
    assert bytes_of(generate(CAPTIONS, model=model, settings=settings)) == by_name
    other = bytes_of(generate(CAPTIONS, model=model, settings=settings, seed=6))
    assert other != by_name
    named["seed"] = 6
    assert other == bytes_of(generate(CAPTIONS, model=model, preset="paper", **SHORT, **named))


def test_settings_come_before_the_storys_and_leave_open_what_they_do_not_say(
    model: StoryModel, tmp_path: Path
) -> None:
    (tmp_path / "story.yaml").write_text(
        "frames: [a fox]\nstyle: comic\nnegative_prompt: lowres\nsettings: {steps: 9, seed: 3}\n"
    )
    story = Story.read(tmp_path / "story.yaml")
    run = tmp_path / "run"
    settings = Settings(iterations=0, steps=1, reference_fit="crop")
    notices = draw(story, model=model, settings=settings, output=run, progress=False).notices
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["settings"]["steps"] == 1 and manifest["settings"]["seed"] == 0
    assert manifest["sources"]["steps"] == manifest["sources"]["seed"] == "settings"
    assert (manifest["settings"]["style"], manifest["settings"]["negative_prompt"]) == ("comic", "lowres")
    assert manifest["settings"]["width"] == 128 and manifest["sources"]["width"] == "model"
    assert not any(
        "is not used" in notice for notice in notices
    )  # what a whole object says beside the point is no mistake


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            {"settings": {"steps": 3}},
            "wanted a Settings object, got a dict; give single values by their names",
        ),
        ({"settings": Settings(), "preset": "paper"}, "give one of the two"),
        ({"settings": Settings(steps=0)}, r"steps \(settings\): wanted 1 to 1000, got 0"),
        ({"settings": Settings(mode="loop")}, r"mode \(settings\)|settings: wanted one of iterative, causal"),
    ],
)
def test_settings_that_cannot_be_used(model: StoryModel, options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        generate(CAPTIONS, model=model, **options)


# -- the callback and the bar


def test_the_callback_hears_of_every_event_first(model: StoryModel) -> None:
    heard: list[Event] = []
    for n, event in enumerate(generate(CAPTIONS, model=model, callback=heard.append, **SHORT), start=1):
        assert heard[-1] is event and len(heard) == n
    assert isinstance(heard[0], StoryStarted) and isinstance(heard[-1], StoryFinished)


def test_what_the_callback_raises_ends_the_drawing_and_the_run_goes_on_later(
    model: StoryModel, tmp_path: Path
) -> None:
    class Enough(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, FrameDrawn) and event.frame == 1:
            raise Enough

    with pytest.raises(Enough):
        list(generate(CAPTIONS, model=model, output=tmp_path / "run", callback=stop, **SHORT))
    rest = bytes_of(generate(CAPTIONS, model=model, output=tmp_path / "run", **SHORT))
    assert sorted(rest) == [(1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"iterations": 1, "steps": 3}, 12), ({"mode": "causal", "steps": 3, "drafts": 1}, 6)],
    ids=["iterative", "causal"],
)
def test_the_bar_ends_with_every_step(
    model: StoryModel, settings: dict[str, Any], steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(CAPTIONS, model=model, **settings)
    last = capsys.readouterr().err.strip().rsplit("\r", 1)[-1]
    assert "100%" in last and f"{steps}/{steps}" in last
    draw(CAPTIONS, model=model, progress=False, **settings)
    assert capsys.readouterr().err == ""


# -- draw


def test_draw_gives_what_generate_tells(model: StoryModel, tmp_path: Path) -> None:
    told = bytes_of(generate(CAPTIONS, model=model, **SHORT))
    drawn = draw(CAPTIONS, model=model, progress=False, **SHORT)
    pictures = {
        (k, i): image.tobytes() for k, images in enumerate(drawn.rounds) for i, image in enumerate(images)
    }
    assert pictures == told and drawn.folder is None
    assert drawn.images == drawn.rounds[1] and all(isinstance(image, Image.Image) for image in drawn.images)
    for _ in range(2):  # the second time nothing is left to draw
        kept = draw(CAPTIONS, model=model, progress=False, output=tmp_path / "run", **SHORT)
        assert kept.folder == tmp_path / "run"
        assert [[image.tobytes() for image in images] for images in kept.rounds] == [
            [image.tobytes() for image in images] for images in drawn.rounds
        ]


def test_draw_in_causal_mode_has_one_round(model: StoryModel) -> None:
    drawn = draw(CAPTIONS, model=model, progress=False, mode="causal", steps=2)
    assert len(drawn.rounds) == 1 and len(drawn.images) == 2


def test_draw_takes_one_story(model: StoryModel) -> None:
    stories = [Story.from_captions(CAPTIONS), Story.from_captions(CAPTIONS)]
    with pytest.raises(InputError, match="draw takes one story"):
        draw(stories, model=model)  # type: ignore[arg-type]


def test_a_notebook_shows_the_final_pictures_and_not_their_reprs() -> None:
    drawing = draw(["A fox is jumping."] * 7, steps=1, iterations=1, progress=False)
    shown = np.asarray(Image.open(io.BytesIO(drawing._repr_png_())))
    assert shown.shape == (2 * 128 + 4, 6 * 128 + 5 * 4, 3)
    for n, image in enumerate(drawing.images):
        top, left = n // 6 * 132, n % 6 * 132
        assert np.array_equal(shown[top : top + 128, left : left + 128], np.asarray(image))
