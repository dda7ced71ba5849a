"""A typo must be found before hours of drawing, and its message must lead to the line."""

import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from fastory.errors import InputError
from fastory.story import MAX_BYTES, Story


def read(folder: Path, name: str, text: str | bytes) -> Story:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Story.read(path)


YAML_ERRORS = {
    "unknown-key": ("frames: [a]\nstlye: comic", 2, ["stlye", "'style'"]),
    "unknown-frame-key": ("frames:\n- a\n- {caption: b, sed: 1}", 3, ["frames[1].sed", "'seed'"]),
    "unknown-character-key": ("frames: [a]\ncharacters:\n  Ann:\n    prmpt: x", 4, ["'prompt'"]),
    "caption-with-colon": ("frames:\n- a\n- Ann: swims", 3, ["quotes"]),
    "no-frames-key": ("title: x", 1, ["frames", "at least one caption"]),
    "no-frames": ("title: x\nframes: []", 2, ["at least one caption", "empty list"]),
    "null-frames": ("title: x\nframes:", 2, ["at least one caption"]),
    "empty-caption": ("frames:\n- a\n- '  '", 3, ["frames[1]", "empty"]),
    "invisible-caption": ('frames:\n- a\n- "\\u200b"', 3, ["frames[1]", "empty"]),
    "null-caption": ("frames:\n- a\n-", 3, ["frames[1]", "caption"]),
    "number-as-caption": ("frames:\n- 42", 2, ["quotes", "number 42"]),
    "number-as-title": ("frames: [a]\ntitle: 1984", 2, ["title", "quotes", "1984"]),
    "control-character": ('frames:\n- "a \\e[31m"', 2, ["U+001B"]),
    "surrogate": ('frames:\n- "\\ud800"', 2, ["U+D800"]),
    "surrogate-in-settings": ('frames: [a]\nsettings: {x: "\\ud800"}', 2, ["settings"]),
    "negative-seed": ("frames:\n- caption: a\n  seed: -1", 3, ["2**63 - 1", "-1"]),
    "huge-seed": ("frames:\n- {caption: a, seed: 9223372036854775808}", 2, ["2**63 - 1"]),
    "endless-seed": ("frames:\n- {caption: a, seed: " + "9" * 5000 + "}", 2, []),
    "octal-seed": ("frames:\n- {caption: a, seed: 010}", 2, ["'010'"]),
    "seed-true": ("frames:\n- {caption: a, seed: true}", 2, ["true"]),
    "scale-infinite": ("frames: [a]\ncharacters:\n  Ann: {scale: .inf}", 3, ["finite"]),
    "scale-nan": ("frames: [a]\ncharacters:\n  Ann: {scale: .nan}", 3, ["finite"]),
    "scale-negative": ("frames: [a]\ncharacters:\n  Ann: {scale: -1}", 3, ["-1"]),
    "newer-version": ("frames: [a]\nversion: 2\nnovelty: 1", 2, ["number 2", "update"]),
    "older-version": ("version: 0\nframes: [a]", 1, ["number 0"]),
    "version-as-text": ("version: '1'\nframes: [a]", 1, ["'1'"]),
    "same-name-other-case": ("frames: [a]\ncharacters:\n  Ann: {}\n  ANN: {}", 4, ["'Ann'", "'ANN'"]),
    "same-key-twice": ("frames: [a]\ntitle: x\ntitle: y", 3, ["'title'", "line 2"]),
    "unknown-in-cast": ("characters: {Ann: }\nframes:\n- {caption: a, characters: [An]}", 3, ["'Ann'"]),
    "unknown-in-boxes": ("frames:\n- {caption: a, boxes: {Ann: [0, 0, 1, 1]}}", 2, ["'Ann'"]),
    "box-of-two": ("characters: {A: }\nframes:\n- {caption: a, boxes: {A: [0, 1]}}", 3, ["four"]),
    "box-beyond": ("characters: {A: }\nframes:\n- {caption: a, boxes: {A: [0, 0, 1, 2]}}", 3, ["0 to 1"]),
    "box-inside-out": ("characters: {A: }\nframes:\n- {caption: a, boxes: {A: [1, 0, 0, 1]}}", 3, ["<"]),
    "first-frame-number": ("frames: [a]\nfirst_frame: 3", 2, ["picture"]),
    "unknown-style": ("frames: [a]\nstyle: comics", 2, ["'comic'", "{prompt}"]),
    "settings-list": ("frames: [a]\nsettings: [1]", 2, ["mapping"]),
    "references-text": ("frames: [a]\ncharacters:\n  A: {references: a.png}", 3, ["list"]),
    "list-of-captions": ("- a\n- b", 1, ["frames"]),
    "only-a-text": ("hello", 1, ["frames"]),
    "only-comments": ("# hello", 1, ["frames"]),
    "syntax": ("title: x\nframes: [a\nx: y", 3, ["quotes"]),
    "tab": ("frames:\n\t- a", 2, ["spaces"]),
    "two-documents": ("frames: [a]\n---\nframes: [b]", 2, []),
    "alias": ("frames: &f [a]\nstyle: *f", 2, ["alias"]),
    "bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nframes: [*b]", 2, ["alias"]),
    "depth": ("frames:\n" + "[" * 40, 2, ["nested"]),
    "abyss": ("frames:\n" + "[" * 5000, 2, []),
    "python-object": ("frames:\n- !!python/object/apply:os.system [true]", 2, ["tag"]),
    "other-tag": ("frames:\n- !!binary YQ==", 2, ["tag"]),
    "list-as-key": ("frames: [a]\n? [x]\n: y", 2, ["key"]),
    "control-byte": ("frames:\n- a\x00", 2, ["U+0000"]),
    "not-utf-8": (b"frames:\n- caf\xe9", 2, ["UTF-8", "0xe9"]),
    "utf-16": ("frames: [a]".encode("utf-16"), 1, ["UTF-8"]),
    "empty": ("", 1, ["empty"]),
}


@pytest.mark.parametrize(("text", "line", "words"), YAML_ERRORS.values(), ids=YAML_ERRORS)
def test_yaml(tmp_path, text, line, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, "story.yaml", text)
    message = str(error.value)
    place = f"{tmp_path / 'story.yaml'}:{line}: "
    assert message.startswith(place)
    # not in the place: pytest's folder has the name of the case
    assert all(word in message.removeprefix(place) for word in words), message
    assert "\n" not in message and message.isprintable()


JSON_ERRORS = {
    "syntax": ('{"frames": ["a",\n]}', 2, []),
    "unknown-key": ('{\n\t"frames": ["a"],\n\t"stlye": "comic"}', 3, ["'style'"]),
    "after-astral-escape": ('{"frames": ["\\ud83d\\ude00",\n"\u2028 \\/ \\u007f", 3]}', 2, ["frames[1]"]),
    "same-key-twice": ('{"frames": ["a"],\n"frames": ["b"]}', 2, ["line 1"]),
    "empty-caption": ('{"frames": [\n"a",\n""]}', 3, ["frames[1]"]),
    "nan-scale": ('{"frames": ["a"],\n"characters": {"A": {"scale": NaN}}}', 2, ["finite"]),
    "long-scale": ('{"frames": ["a"],\n"characters": {"A": {"scale": 1e999}}}', 2, ["finite"]),
    "depth": ('{"frames": ' + "[" * 200 + "]" * 200 + "}", 1, ["nested"]),
}


@pytest.mark.parametrize(("text", "line", "words"), JSON_ERRORS.values(), ids=JSON_ERRORS)
def test_json(tmp_path, text, line, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, "story.json", text)
    place = f"{tmp_path / 'story.json'}:{line}: "
    assert str(error.value).startswith(place)
    assert all(word in str(error.value).removeprefix(place) for word in words), str(error.value)


@pytest.mark.parametrize("text", ['{"frames": [' + "9" * 5000 + "]}", '{"frames": ' + "[" * 100_000])
def test_json_that_exhausts_python_is_an_input_error(tmp_path, text):
    with pytest.raises(InputError, match=r"story\.json"):
        read(tmp_path, "story.json", text)


def test_txt_counts_blank_and_comment_lines(tmp_path):
    with pytest.raises(InputError, match=r"story\.txt:4: frames\[1\].*U\+0007"):
        read(tmp_path, "story.txt", "a\r\n\r\n# note\r\nb\x07")


def test_txt_of_comments_alone(tmp_path):
    with pytest.raises(InputError, match="at least one caption"):
        read(tmp_path, "story.txt", "# a\n\n")


def test_paths_that_are_no_story(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "large.txt").write_bytes(b"a\n" * MAX_BYTES)
    wanted = {
        "folder.yaml": "folder",
        "absent.yaml": "there is none",
        "pipe.txt": "pipe",
        "large.txt": "KiB",
        "story.md": "suffix '.md'",
        "story": "no suffix",
        "a\0.txt": "cannot be used",
    }
    for name, words in wanted.items():
        with pytest.raises(InputError, match=words):
            Story.read(tmp_path / name)


CAPTIONS_ERRORS = {
    "one-text": ("a caption", "list of texts"),
    "number": (3, "list of texts"),
    "none": ([], "at least one"),
    "empty": (["a", " "], r"frames\[1\]"),
    "not-text": (["a", 3], r"frames\[1\]"),
}


@pytest.mark.parametrize(("captions", "words"), CAPTIONS_ERRORS.values(), ids=CAPTIONS_ERRORS)
def test_captions_from_python(captions, words):
    with pytest.raises(InputError, match=words):
        Story.from_captions(captions)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "story"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "outside.png")
    Image.effect_noise((64, 64), 50).save(folder / "good.png")
    return folder


def refusal(folder: Path, reference: str) -> str:
    """The message for a story whose character Ann has a second, bad reference."""
    text = f"frames: [Ann runs.]\ncharacters:\n  Ann:\n    references:\n    - good.png\n    - {reference!r}"
    with pytest.raises(InputError) as error:
        read(folder, "story.yaml", text)
    assert str(error.value).startswith(f"{folder / 'story.yaml'}:6: characters.Ann.references[1]: ")
    return str(error.value)


def test_reference_outside_the_folder(folder):
    assert "outside" in refusal(folder, "../outside.png")
    assert "outside" in refusal(folder, str(folder.parent / "outside.png"))
    assert "outside" in refusal(folder, "/etc/passwd")
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    assert "outside" in refusal(folder, "link.png")


def test_reference_that_is_missing_or_a_folder(folder):
    (folder / "album").mkdir()
    assert "no such file" in refusal(folder, "absent.png")
    assert "a folder" in refusal(folder, "album")
    (folder / "loop.png").symlink_to("loop.png")
    assert "loop" in refusal(folder, "loop.png")


def test_reference_that_is_no_picture(folder):
    good = (folder / "good.png").read_bytes()
    with Image.open(folder / "good.png") as image:
        image.save(folder / "good.jpg")
    jpeg = (folder / "good.jpg").read_bytes()
    broken = {
        "text.png": b"hello",
        "empty.png": b"",
        "cut.png": good[: len(good) // 2],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "flipped.png": good[:200] + bytes([good[200] ^ 255]) + good[201:],
        "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
        assert "cannot be read" in refusal(folder, name)


def test_reference_that_is_a_pickle_is_not_opened(folder):
    (folder / "ann.png").write_bytes(pickle.dumps({"a": 1}))
    assert "pickle" in refusal(folder, "ann.png")


def test_reference_too_large_to_decode(folder):
    Image.new("1", (20_000, 5_001)).save(folder / "large.png")
    assert "pixels: make it smaller" in refusal(folder, "large.png")
