"""A run is resumed, or refused, by a story's digests: they must follow its meaning and nothing else."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastory.errors import InputError
from fastory.story import Frame, Story

FULL = {
    "version": 1,
    "title": "The kite",
    "style": "comic",
    "negative_prompt": "lowres",
    "settings": {"steps": 20, "reference_scale": "0.3:0.5", "nested": {"a": [1, 2.5, True, None]}},
    "first_frame": "ann.png",
    "characters": {
        "Ann": {"prompt": "a girl", "references": ["ann.png"], "scale": 0.5},
        "No": {},
    },
    "frames": [
        "Ann runs.",
        {"caption": "12:30", "seed": 7},
        {"caption": "x", "characters": ["Ann"], "boxes": {"Ann": [0, 0, 0.5, 1]}},
    ],
}


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "ann.png")

    def write(data, name="story.json") -> Story:
        (tmp_path / name).write_text(json.dumps(data), encoding="utf-8")
        return Story.read(tmp_path / name)

    return write


def test_yaml_json_and_txt_agree(write, tmp_path):
    from_json = write(FULL)
    (tmp_path / "story.yml").write_text(yaml.safe_dump(FULL), encoding="utf-8")
    from_yaml = Story.read(tmp_path / "story.yml")
    assert from_yaml == from_json
    assert from_yaml.digest() == from_json.digest()
    (tmp_path / "kite.TXT").write_bytes("\ufeffa\r\n\r\n # no\r\n b  c \r\n".encode())
    assert Story.read(tmp_path / "kite.TXT") == Story.from_captions(["a", "b\nc"], title="kite")


def test_to_yaml_reads_back_the_same(write, tmp_path):
    story = write(FULL)
    (tmp_path / "again.yaml").write_text(story.to_yaml(), encoding="utf-8")
    again = Story.read(tmp_path / "again.yaml")
    assert again == story
    assert again.digest() == story.digest()
    assert "../ann.png" in story.to_yaml(tmp_path / "run")
    assert str(tmp_path) not in story.to_yaml()


TEXTS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cf")), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), TEXTS)
def test_any_text_survives_yaml_and_json(tmp_path_factory, captions, title):
    folder = tmp_path_factory.mktemp("texts")
    story = Story.from_captions(captions, title=title)
    (folder / "a.yaml").write_text(story.to_yaml(), encoding="utf-8")
    (folder / "a.json").write_text(json.dumps({"title": title, "frames": captions}), encoding="utf-8")
    assert Story.read(folder / "a.yaml") == story
    assert Story.read(folder / "a.json") == story


@pytest.mark.parametrize(
    "caption", ["No", "12:30", "2024-01-01", "1e5", "0x10", "~", "null", "a: b # c", "- x", "", "010"]
)
def test_texts_that_look_like_other_types(caption, tmp_path):
    if not caption:
        caption = "'quoted' \"both\""
    story = Story.from_captions([caption])
    (tmp_path / "a.yaml").write_text(story.to_yaml(), encoding="utf-8")
    assert Story.read(tmp_path / "a.yaml").frames[0].caption == caption


def test_moving_a_story_keeps_its_digest(write, tmp_path):
    story = write(FULL)
    other = tmp_path / "elsewhere"
    other.mkdir()
    (tmp_path / "ann.png").rename(other / "moved.png")
    moved = json.loads(json.dumps(FULL).replace("ann.png", "moved.png"))
    (other / "renamed.json").write_text(json.dumps(moved))
    # the first story's pictures are gone, so its digest is taken from one written anew
    assert Story.read(other / "renamed.json").digest() == write(FULL | rescue(tmp_path)).digest()
    assert story.settings == moved["settings"]


def rescue(folder: Path) -> dict:
    Image.new("RGB", (8, 8), "red").save(folder / "ann.png")
    return {}


CHANGES = {
    "title": lambda d: d.update(title="Other"),
    "style": lambda d: d.update(style="film"),
    "negative": lambda d: d.update(negative_prompt="blur"),
    "first-frame": lambda d: d.pop("first_frame"),
    "name": lambda d: d["characters"].update(Bo={}),
    "prompt": lambda d: d["characters"]["Ann"].update(prompt="a boy"),
    "scale": lambda d: d["characters"]["Ann"].update(scale=0.6),
    "reference": lambda d: d["characters"]["Ann"].update(references=[]),
    "one-frame-more": lambda d: d["frames"].append("y"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_to_the_whole_story_show(write, change):
    before = write(FULL)
    data = json.loads(json.dumps(FULL))
    change(data)
    after = write(data, "other.json")
    assert after.digest_without_frames() != before.digest_without_frames()
    assert after.digest() != before.digest()
    assert after.frame_digest(0) == before.frame_digest(0)


@pytest.mark.parametrize(
    "frame",
    [
        "x",
        {"caption": "y", "seed": 7},
        {"caption": "12:30"},
        {"caption": "12:30", "seed": 7, "characters": ["Ann"]},
    ],
)
def test_changes_to_a_frame_show_in_it_alone(write, frame):
    before = write(FULL)
    data = json.loads(json.dumps(FULL))
    data["frames"][1] = frame
    after = write(data, "other.json")
    same = [before.frame_digest(i) == after.frame_digest(i) for i in range(3)]
    assert same == [True, False, True]
    assert after.digest_without_frames() == before.digest_without_frames()
    assert after.digest() != before.digest()


def test_settings_and_layout_do_not_count(write):
    before = write(FULL)
    assert write(FULL | {"settings": {}}, "other.json").digest() == before.digest()


def test_the_bytes_of_a_reference_count(write, tmp_path):
    story = write(FULL)
    before = story.digest()
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "ann.png")
    assert story.digest() != before
    (tmp_path / "ann.png").unlink()
    with pytest.raises(InputError, match=r"ann\.png"):
        story.digest()


def test_where_names_the_line_of_a_setting(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "frames:\n- a\n- caption: b\n  seed: 1\nsettings:\n  steps: 3\ncharacters:\n  Dr. No: {}\n"
    )
    story = Story.read(path)
    assert story.where("settings.steps") == f"{path}:6"
    assert story.where("frames.1.seed") == story.where(("frames", 1, "seed")) == f"{path}:4"
    assert story.where(("characters", "Dr. No")) == f"{path}:8"
    assert story.where("settings.absent") == ""
    assert Story.from_captions(["a"]).where("frames.0") == ""


@pytest.mark.parametrize(
    ("title", "slug"),
    [("The Kite!", "the-kite"), ("Ünï—CODE  x", "unicode-x"), ("CON", "story-con"), ("../../etc", "etc")],
)
def test_slug_is_a_file_name(title, slug):
    assert Story.from_captions(["a"], title=title).slug == slug


@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_slug_of_any_title(title):
    slug = Story(title, (Frame("a"),)).slug
    assert 1 <= len(slug) <= 60
    assert set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_slugs_of_titles_in_another_script_differ():
    assert Story("風", ()).slug != Story("凧", ()).slug
