"""Risk: a caption that says `he` is drawn without him, as another one, or otherwise when its own story file is read again."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from fastory import Settings, Story, StoryModel
from fastory.runs.resolve import resolve_story

CAST = {
    "Ann": "a girl with a red coat",
    "Tom": "an old man with a grey beard",
    "Rex": "a brown dog",
    "Kim": None,
}


def story(*captions: str | dict[str, object], cast: dict[str, str | None] | None = None) -> Story:
    lines = ["characters:"]
    for name, prompt in (CAST if cast is None else cast).items():
        lines.append(f"  {name}: {{{'' if prompt is None else 'prompt: ' + prompt}}}")
    lines.append("frames:")
    for caption in captions:
        entry = {"caption": caption} if isinstance(caption, str) else caption
        lines += [f"  - caption: {entry['caption']!r}"]
        lines += [f"    characters: {entry['characters']}"] if "characters" in entry else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "story.yaml"
        file.write_text("\n".join(lines))
        return Story.read(file)


def meant(
    *captions: str | dict[str, object], **more: dict[str, str | None]
) -> list[tuple[int, str, tuple[str, ...]]]:
    return [(one.frame, one.word, one.names) for one in story(*captions, **more).understood()[1]]


@pytest.mark.parametrize(
    ("captions", "wanted"),
    [
        (("Ann waves.", "She laughs."), [(1, "She", ("Ann",))]),
        (("Ann meets Tom.", "He smiles."), [(1, "He", ("Tom",))]),
        (("Tom meets Ann.", "He smiles."), [(1, "He", ("Tom",))]),  # the last one is a girl
        (("Tom walks.", "Ann walks.", "He sits.", "She sits."), [(2, "He", ("Tom",)), (3, "She", ("Ann",))]),
        (("Ann finds Rex.", "It barks."), [(1, "It", ("Rex",))]),
        (("Ann finds Rex.", "He barks at her."), [(1, "He", ("Rex",)), (1, "her", ("Ann",))]),
        (("Ann meets Kim.", "She waves."), [(1, "She", ("Kim",))]),  # of whom nothing is said
        (("Kim has a boat.", "It sinks."), []),
        (("Kim meets Rex.", "He barks.", "She laughs."), [(1, "He", ("Rex",)), (2, "She", ("Kim",))]),
        (("Ann finds Rex.", "It rains.", "It is late.", "It was a cold, dark night."), []),
        (("Rex runs.", "It barks, for it is late."), [(1, "It", ("Rex",))]),
        (("Ann meets Tom.", "They walk."), [(1, "They", ("Ann", "Tom"))]),
        (("Tom meets Ann.", "Rex comes.", "They walk."), [(2, "They", ("Ann", "Tom"))]),
        (("Rex runs.", "Ann runs.", "They rest."), [(2, "They", ("Ann", "Rex"))]),
        (("Ann runs.", "They rest."), []),
        (("Tom sits.", "Ann sits.", "The man sleeps."), [(2, "The man", ("Tom",))]),
        (("Tom sits.", "The woman sleeps."), []),
        (
            ("Rex runs.", "Tom runs.", "The dog wags his tail."),
            [(2, "The dog", ("Rex",)), (2, "his", ("Rex",))],
        ),
        (("She laughs.", "Ann laughs."), []),  # nobody yet
        (("Ann laughs.", "Tom sees her."), []),  # a caption with a name says who is in it
        (("Ann sits.", "Her hat falls."), [(1, "Her", ("Ann",))]),
        (("The theme is heat.", "Hello there."), []),
    ],
)
def test_the_last_fitting_one_is_meant(captions: tuple[str, ...], wanted: list[object]) -> None:
    assert meant(*captions) == wanted


def test_the_frame_s_own_list_decides_who_can_be_meant() -> None:
    assert meant("Ann meets Kim.", {"caption": "She waves.", "characters": ["Ann"]}) == [(1, "She", ("Ann",))]
    both = {"caption": "They wave.", "characters": ["Rex", "Ann"]}
    assert meant("Ann meets Tom.", both) == [(1, "They", ("Ann", "Rex"))]


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("He takes off his hat.", "Tom, an old man with a grey beard, takes off his hat."),
        ("His hat falls, and he laughs.", "His hat falls, and Tom, an old man with a grey beard, laughs."),
        ("His hat falls.", "Tom's, an old man with a grey beard, hat falls."),
        ("They rest.", "Ann, a girl with a red coat, and Tom, an old man with a grey beard, rest."),
        ("Rain falls on her.", "Rain falls on Ann, a girl with a red coat."),
        ("Her dog runs to her.", "Her dog runs to Ann, a girl with a red coat."),
        ("Rain falls.", "Rain falls."),
    ],
)
def test_the_model_is_told_the_name_and_what_the_character_is(caption: str, prompt: str) -> None:
    understood, _ = story("Ann meets Tom.", caption).understood()
    assert understood.prompt(1) == prompt
    assert understood.frames[1].caption == caption


def test_what_was_understood_stands_in_the_file_and_is_understood_again(tmp_path: Path) -> None:
    first, meant_first = story(
        "Ann meets Rex.", "It barks.", "She laughs.", "They run.", "Tom comes.", "They rest."
    ).understood()
    file = tmp_path / "story.yaml"
    file.write_text(first.to_yaml(tmp_path))
    again, meant_again = Story.read(file).understood()
    assert "- caption: It barks.\n  characters:\n  - Rex\n" in file.read_text()
    assert meant_again == meant_first
    assert again.digest() == first.digest()
    assert [again.prompt(i) for i in range(6)] == [first.prompt(i) for i in range(6)]


def test_a_run_says_what_it_understood() -> None:
    model = StoryModel.open("builtin")
    told = resolve_story(model, story("Ann meets Tom.", "He smiles."), {"iterations": 1, "steps": 1})
    assert told.notices[0].startswith("understood frame 1: `He` is Tom (--pronouns off")
    assert told.story.cast(1) == {"Tom"}

    silent = resolve_story(model, story("Ann meets Tom.", "Tom smiles."), {"iterations": 1, "steps": 1})
    assert silent.notices == () or not silent.notices[0].startswith("understood")
    assert (
        told.settings.identity() == silent.settings.identity()
    )  # a redrawn caption may bring the first pronoun

    off = resolve_story(
        model, story("Ann meets Tom.", "He smiles."), {"iterations": 1, "steps": 1, "pronouns": "off"}
    )
    assert off.prompts[1] == "He smiles." and not off.story.cast(1)
    assert off.settings.identity() == {**told.settings.identity(), "pronouns": "off"}
    assert Settings().pronouns == "on"
