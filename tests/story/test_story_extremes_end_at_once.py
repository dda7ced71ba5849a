"""A story file of any content within 1 MiB is read, or refused in one line, in seconds; names are found as before."""

from __future__ import annotations

import re
import struct
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastory import pictures
from fastory.errors import InputError
from fastory.settings import check
from fastory.story import MAX_FRAMES, MAX_NAME, Character, Frame, Story
from fastory.story.names import Names

SECONDS = 10  # each took over 40; on a quiet machine each takes under 3


def seconds_of(work) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def refusal(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        Story.read(path)
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and len(message) < 1500
    return message.removeprefix(str(path))


def by_one_expression(names: list[str], text: str) -> list[tuple[str, int, int]]:
    """What Story did before Names: one regular expression of all names, the longest first."""
    longest_first = sorted(enumerate(names), key=lambda item: -len(item[1]))
    joined = "|".join(f"(?P<c{k}>{re.escape(name)})" for k, name in longest_first)
    pattern = re.compile(rf"(?<!\w)(?:{joined})(?:['’]s)?(?!\w)", re.IGNORECASE)
    return [
        (names[int((match.lastgroup or "")[1:])], match.start(), match.end())
        for match in pattern.finditer(text)
    ]


# Few letters, so that names begin and contain each other; and letters whose cases are no pair: Kelvin, dotless i,
# long s, sharp s, final sigma, iota below.
NAME = st.text("aAbB 's’-_.1éÉıİiIſsKkßẞσςΣǅ\u0345ι\u1fbe", min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(NAME, min_size=1, max_size=8), st.text("aAbB 's’-_.1éÉıİiIſsKkßẞσςΣǅ\u0345ι\u1fbe", max_size=30)
)
@example(["Mary", "Mary Ann"], "Mary Ann's Mary's mary anns MARY")
@example(["a", "a a", "a a a"], "a a a a a'sa a's")
@example(["b.", "b", "-b"], "-b. b. b.b -bb")
def test_names_are_found_as_one_expression_of_all_finds_them(names: list[str], text: str) -> None:
    found = [(names[index], match.start(), match.end()) for index, match in Names(names).find(text)]
    assert found == by_one_expression(names, text)


@settings(max_examples=200, deadline=None)
@given(st.lists(NAME, min_size=1, max_size=4), st.data())
def test_names_are_found_among_words_that_hold_them(names: list[str], data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.sampled_from([*names, *(n.swapcase() for n in names), " ", "'s", "x"])))
    text = "".join(parts)
    found = [(names[index], match.start(), match.end()) for index, match in Names(names).find(text)]
    assert found == by_one_expression(names, text)


def test_digests_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Fixed values from before names were searched otherwise: a run begun with an earlier version goes on."""
    pixels = b"\x20\x40\xff\x00\x80\x10\0\0" + b"\xff\xff\xff\x00\x00\x00\0\0"
    head = struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, 2, 2, 1, 24, 0, 16, 2835, 2835, 0, 0)
    (tmp_path / "ann.bmp").write_bytes(b"BM" + head + pixels)
    (tmp_path / "kite.yaml").write_text(
        "version: 1\ntitle: The kite\nstyle: comic\nnegative_prompt: lowres\nfirst_frame: ann.bmp\n"
        "settings: {steps: 3}\ncharacters:\n"
        "  Ann: {prompt: a girl in a red coat, references: [ann.bmp, ann.bmp], scale: 0.5}\n"
        "  Mary Ann: {prompt: Ann's friend}\n"
        '  "Ürsula": {}\n'
        "frames:\n  - Ann runs after the kite.\n"
        '  - {caption: "mary ann\'s hat flies, says ANN.", seed: 7}\n'
        "  - {caption: The sea, characters: [ürsula], boxes: {Ann: [0, 0.25, 0.5, 1]}}\n",
        encoding="utf-8",
    )
    story = Story.read(tmp_path / "kite.yaml")
    assert story.digest() == "c03b8bf37608b0a2923cbcbbf94c4b7b8f19163a911a1f1453a530194b44f585"
    assert [story.frame_digest(i)[:8] for i in range(3)] == ["5eef7dd4", "62a6113e", "4af8aa79"]
    assert story.prompt(1) == (
        "comic book panel, mary ann's, Ann's friend, hat flies, says ANN, a girl in a red coat, bold ink "
        "outlines, flat colours"
    )


def test_thousands_of_characters_in_thousands_of_frames() -> None:
    characters = tuple(Character(f"Ann {k}", f"a girl {k}") for k in range(5000))
    frames = tuple(Frame(f"Ann {k} meets ann {4999 - k}.") for k in range(5000))
    story = Story("t", frames, characters)

    def use() -> None:
        assert story.cast(7) == {"Ann 7", "Ann 4992"}
        assert story.prompt(7) == "Ann 7, a girl 7, meets ann 4992, a girl 4992."
        story.digest()
        for i in range(5000):
            story.prompt(i)

    assert seconds_of(use) < SECONDS


@pytest.mark.parametrize("caption", ["ann " * 200_000, "ann\n" * 10, "a" * 800_000, "ann " * 3000])
def test_long_captions(caption: str) -> None:
    names = [" ".join(["ann"] * k) + " b" for k in range(1, 50)] + ["ann"]
    story = Story("t", (Frame(caption),), tuple(Character(name, "x") for name in names))
    assert seconds_of(lambda: story.prompt(0)) < SECONDS


def test_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    opened: list[Path] = []
    real = pictures._regular_file
    monkeypatch.setattr(pictures, "_regular_file", lambda path: (opened.append(path), real(path))[1])
    references = ",".join(["a.png", "./a.png"] * 1000)
    (tmp_path / "s.yaml").write_text(f"frames: [Ann]\ncharacters: {{Ann: {{references: [{references}]}}}}\n")
    story = Story.read(tmp_path / "s.yaml")
    assert len(story.characters[0].references) == 2000 and len(opened) == 2
    assert story.digest() == story.digest()


@pytest.mark.parametrize("form", ["txt", "yaml", "json", "flow"])
def test_more_frames_than_a_story_may_have(tmp_path: Path, form: str) -> None:
    count = 250_000 if form != "txt" else 520_000
    text = {
        "txt": "a\n" * count,
        "yaml": "frames:\n" + "- a\n" * count,
        "flow": "title: frames\nframes: [" + "a, " * count + "]",
        "json": '{"frames": [' + ",".join(['"a"'] * count) + "]}",
    }[form]
    path = tmp_path / f"s.{form.replace('flow', 'yaml')}"
    message = ""

    def read() -> None:
        nonlocal message
        message = refusal(path, text)

    assert seconds_of(read) < SECONDS
    assert f"wanted at most {MAX_FRAMES} frames, got more: split the story" in message
    if form in ("txt", "yaml"):
        assert message.startswith(f":{MAX_FRAMES + 1 + (form == 'yaml')}: ")


def test_captions_that_never_end() -> None:
    def forever():
        while True:
            yield "a"

    with pytest.raises(InputError, match="split the story"):
        Story.from_captions(forever())
    assert len(Story.from_captions(["a"] * MAX_FRAMES).frames) == MAX_FRAMES


PICTURES = {
    "long-name": ("x" * 300 + ".png", "File name too long"),
    "long-path": ("y/" * 3000 + "x.png", "too long"),
    "nul": ("a\\0.png", "null"),
    "unknown-home": ("~nouser/x.png", "no such file"),
}


@pytest.mark.parametrize("key", ["first_frame", "reference"])
@pytest.mark.parametrize(("given", "words"), PICTURES.values(), ids=PICTURES)
def test_names_of_pictures(tmp_path: Path, key: str, given: str, words: str) -> None:
    said = (
        f'first_frame: "{given}"'
        if key == "first_frame"
        else f'characters: {{A: {{references: ["{given}"]}}}}'
    )
    message = refusal(tmp_path / "s.yaml", f"frames: [A]\n{said}\n")
    assert message.startswith(":2: ") and words in message


def test_names_of_characters(tmp_path: Path) -> None:
    message = refusal(tmp_path / "s.yaml", f"frames: [a]\ncharacters:\n  {'A' * (MAX_NAME + 1)}: {{}}\n")
    assert f"at most {MAX_NAME} letters" in message


STORY_PATHS = ["x" * 300 + ".yaml", "y/" * 3000 + "s.yaml", "a\0.txt"]


@pytest.mark.parametrize("name", STORY_PATHS)
def test_names_of_story_files(name: str) -> None:
    with pytest.raises(InputError, match="wanted a path") as error:
        Story.read(name)
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        '{"frames"\n: ["a"], "frames": ["b"]}',
        '{"frames": ["a"], "title"\n:\n"x", "title":"y"}',
        '{"frames": ["a"], "characters"\n:{"Ann"\n: {}, "Ann": {}}}',
    ],
)
def test_keys_given_twice_where_yaml_finds_no_lines(tmp_path: Path, text: str) -> None:
    assert "twice" in refusal(tmp_path / "s.json", text)


HUGE = 10**400
VALUES = [
    ("guidance_scale", HUGE),
    ("guidance_scale", -HUGE),
    ("guidance_scale", 10**5000),
    ("guidance_scale", "9" * 5000),
    ("reference_scale", HUGE),
    ("reference_scale", [0.3, HUGE]),
    ("reference_scale", [10**5000]),
    ("reference_scale", f"0.3:{'9' * 400}"),
    ("reference_scale", ":" * 5000),
    ("window", "9" * 5000),
    ("window", HUGE),
    ("window", 10**5000),
    ("steps", 10**5000),
    ("seed", HUGE),
    ("width", -(10**5000)),
    ("mode", "x" * 5000),
    ("x" * 5000, 1),
    ("style", "caf\udce9"),
    ("negative_prompt", "caf\udce9"),
    ("steps", "9" * 5000),
    ("steps", {"a": [10**5000]}),
]


@pytest.mark.parametrize(
    ("name", "value"), VALUES, ids=[f"{k}-{name[:20]}" for k, (name, _) in enumerate(VALUES)]
)
def test_settings_beyond_all_bounds_are_one_short_line(name: str, value: object) -> None:
    with pytest.raises(InputError) as error:
        check(name, value, "argument")
    message = str(error.value)
    assert "\n" not in message and len(message) < 600 and message.isprintable()


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("name", ["guidance_scale", "reference_scale", "window", "steps", "seed"])
@pytest.mark.parametrize("form", ["yaml", "json"])
def test_huge_numbers_in_a_storys_settings_name_the_file(
    tmp_path: Path, digits: int, name: str, form: str
) -> None:
    number = "9" * digits
    text = {
        "yaml": f"frames: [a]\nsettings: {{{name}: {number}}}\n",
        "json": f'{{"frames": ["a"],\n"settings": {{"{name}": {number}}}}}',
    }[form]
    path = tmp_path / f"s.{form}"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        story = Story.read(path)
        check(name, story.settings[name], story.where(f"settings.{name}"))
    assert str(path) in str(error.value) and len(str(error.value)) < 400 + len(str(path))
