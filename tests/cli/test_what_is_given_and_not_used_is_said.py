"""A value that the user gave and that decides nothing is told in one line; what presets and model folders hold is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_history import write_causal_folder

from fastory import Story, StoryModel, generate
from fastory.events import Event, Notice
from fastory.story import Character

CAPTIONS = ["a red fox in the sea", "the rabbit sleeps"]


@pytest.fixture(scope="module")
def model(sd15_folder: Path, sd15_adapter_base: Path, tmp_path_factory: pytest.TempPathFactory) -> StoryModel:
    folder = write_causal_folder(sd15_folder, tmp_path_factory.mktemp("both") / "model")
    return StoryModel.open(str(folder), ip_adapter=str(sd15_adapter_base), device="cpu")


def notices(model: StoryModel, story: Story, **options: Any) -> list[str]:
    """What is said before drawing begins."""
    events: Iterator[Event] = generate(story, model=model, **{"steps": 1, **options})
    said = []
    for event in events:
        if isinstance(event, Notice):
            said.append(event.message)
        elif type(event).__name__ == "BatchChosen":
            break
    events.close()  # type: ignore[attr-defined]
    return [message for message in said if "not used" in message]


def story(**fields: Any) -> Story:
    return replace(Story.from_captions(CAPTIONS), **fields)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"mode": "causal", "iterations": 3}, ["iterations"]),
        ({"mode": "causal", "references": "cast", "reference_scale": 0.5}, ["reference_scale", "references"]),
        ({"iterations": 0, "window": 2, "drafts": 1}, ["window", "drafts"]),
        ({"iterations": 0, "references": "others", "reference_fit": "crop"}, ["references", "reference_fit"]),
        ({"iterations": 1, "reference_start": 0}, ["reference_start"]),
        ({"iterations": 0, "guidance_scale": 1.0, "negative_prompt": "dark"}, ["negative_prompt"]),
    ],
)
def test_a_value_of_the_call(model: StoryModel, options: dict[str, Any], names: list[str]) -> None:
    said = notices(model, story(), **options)
    assert sorted(message.split("`")[1] for message in said) == sorted(names)
    assert all("\n" not in message for message in said)


def test_a_value_of_the_story_file(model: StoryModel) -> None:
    said = notices(model, story(settings={"iterations": 3, "mode": "causal"}))
    assert said == [
        "`iterations` of the story file is not used: it belongs to iterative mode, and this story is drawn in causal mode"
    ]


def test_values_that_are_used_and_those_of_a_preset_are_not_told(model: StoryModel) -> None:
    assert notices(model, story(), iterations=1, reference_scale=0.5, references="others", seed=3) == []
    assert notices(model, story(), mode="causal", window=2, drafts=1, negative_prompt="dark") == []
    # a preset's and a folder's own values of another mode are nobody's wish
    assert notices(model, story(), preset="paper", mode="causal", window=2) == []
    assert notices(model, story(), preset="ar-ldm", mode="iterative", iterations=0) == []


def test_seeds_pictures_and_styles(model: StoryModel, tmp_path: Path) -> None:
    seeded = [replace(frame, seed=n) for n, frame in enumerate(story().frames)]
    assert len(notices(model, story(frames=seeded), iterations=0, seed=1, noise="per-frame")) == 2
    assert notices(model, story(frames=[seeded[0], *story().frames[1:]]), iterations=0, seed=1) == []
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "fox.png")
    pictures = [Character("fox", "red", [tmp_path / "fox.png"], None)]
    assert notices(model, story(characters=pictures), iterations=1) == []
    assert len(notices(model, story(characters=pictures), iterations=1, reference_start=2)) == 1
    assert len(notices(model, story(characters=[Character("fox", "red", [], 0.5)]), iterations=1)) == 1
    first = story(first_frame=tmp_path / "fox.png")
    assert [m.split("`")[1] for m in notices(model, first, mode="causal", drafts=2)] == ["drafts"]
    both = story(style="comic", settings={"style": "film"})
    assert [m.split("`")[1] for m in notices(model, both, iterations=0)] == ["settings: style"]


def test_style_and_negative_prompt_of_a_storys_settings_count(model: StoryModel, tmp_path: Path) -> None:
    """They were dropped without a word: the manifest held '' and None, from the paper."""
    import json

    said = story(settings={"style": "comic", "negative_prompt": "lowres"})
    list(generate(said, model=model, steps=1, iterations=0, output=tmp_path / "run"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["style"] == "comic" and manifest["settings"]["negative_prompt"] == "lowres"
    assert manifest["sources"]["style"] == manifest["sources"]["negative_prompt"] == "story"


@pytest.mark.parametrize(
    ("size", "told"),
    [((None, None), False), ((160, 128), False), ((512, 512), True), ((128, 192), True), ((64, 64), True)],
)
def test_the_builtin_model_says_where_it_draws_nonsense(
    size: tuple[int | None, int | None], told: bool
) -> None:
    """Looked at: at 64, 192 and more pixels a side animals are lost, doubled or smeared."""
    model = StoryModel.open("builtin", device="cpu")
    events = generate(story(), model=model, width=size[0], height=size[1], iterations=0, steps=1)
    first = [next(events) for _ in range(4)]
    events.close()  # type: ignore[attr-defined]
    messages = [event.message for event in first if isinstance(event, Notice)]
    assert any("trained at 128 x 128" in message for message in messages) == told
