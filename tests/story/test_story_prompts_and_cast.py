"""Who is in a frame and what the text encoder reads decide every picture of a story."""

import pytest

from fastory.errors import InputError
from fastory.story import STYLES, Character, Frame, Story

CAST = (
    Character("Robinson", "a man in sailor clothes"),
    Character("Mary", "a tall girl"),
    Character("Mary Ann", "Robinson's old friend"),
    Character("R2-D2", None),
)


def story(*captions: str, **more) -> Story:
    return Story("t", tuple(Frame(caption) for caption in captions), CAST, **more)


@pytest.mark.parametrize(
    ("caption", "prompt", "cast"),
    [
        ("Robinson swims.", "Robinson, a man in sailor clothes, swims.", {"Robinson"}),
        ("robinson and ROBINSON", "robinson, a man in sailor clothes, and ROBINSON", {"Robinson"}),
        ("Here is Robinson.", "Here is Robinson, a man in sailor clothes.", {"Robinson"}),
        ("Robinson, tired", "Robinson, a man in sailor clothes, tired", {"Robinson"}),
        ("Robinson", "Robinson, a man in sailor clothes", {"Robinson"}),
        ("Robinson's hat", "Robinson's, a man in sailor clothes, hat", {"Robinson"}),
        ("The Robinsons swim", "The Robinsons swim", set()),
        ("Mary Ann waits", "Mary Ann, Robinson's old friend, waits", {"Mary Ann"}),
        (
            "Mary sees Mary Ann",
            "Mary, a tall girl, sees Mary Ann, Robinson's old friend",
            {"Mary", "Mary Ann"},
        ),
        ("R2-D2 beeps", "R2-D2 beeps", {"R2-D2"}),
        ("A {prompt} \\1 (odd) caption", "A {prompt} \\1 (odd) caption", set()),
    ],
)
def test_first_occurrence_is_described(caption, prompt, cast):
    one = story(caption)
    assert one.prompt(0) == prompt
    assert one.cast(0) == cast


def test_listed_characters_are_in_the_cast_but_not_in_the_prompt():
    one = Story("t", (Frame("The sea.", characters=("Mary",)),), CAST)
    assert one.cast(0) == {"Mary"}
    assert one.prompt(0) == "The sea."


def test_story_without_characters():
    one = Story.from_captions(["Robinson swims."])
    assert one.prompt(0) == "Robinson swims."
    assert one.cast(0) == frozenset()


def test_style_goes_around_the_described_caption():
    one = story("Robinson swims.", style="comic")
    assert one.prompt(0) == STYLES["comic"].replace("{prompt}", "Robinson, a man in sailor clothes, swims")
    assert one.prompt(0, style="none") == "Robinson, a man in sailor clothes, swims."
    assert one.prompt(0, style="ink on {prompt}") == "ink on Robinson, a man in sailor clothes, swims."
    assert one.prompt(0, style="Film").startswith("film still, ")


def test_unknown_style_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="'realistic'"):
        story("a").prompt(0, style="realistc")
