"""A picture that someone else made is opened, or refused in one line: never waited for, never given to other programs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_files import like_a_user, time_limit
from PIL import Image

from fastory import Story, generate
from fastory.errors import InputError
from fastory.pictures import check_picture, open_picture


def bomb(path: Path) -> None:
    Image.new("1", (20000, 20000)).save(path, "PNG")


def unreadable(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, "PNG")
    path.chmod(0)


def cut(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-2000])


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "a pipe or a device"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a pipe or a device"),
    "folder": (lambda path: path.mkdir(), "a folder"),
    "missing": (lambda path: None, "no such file"),
    "loop": (lambda path: path.symlink_to(path), "cannot be read"),
    "unreadable": (unreadable, "cannot be read (Permission denied)"),
    "bomb": (bomb, "more than"),
    "eps": (
        lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "cannot be read",
    ),
    "pickle": (lambda path: path.write_bytes(b"\x80\x04."), "never opened"),
    "text": (lambda path: path.write_text("no picture"), "cannot be read"),
    "empty": (lambda path: path.touch(), "cannot be read"),
    "cut": (cut, "cannot be read"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("read", [open_picture, check_picture])
def test_refused_in_one_line_at_once(tmp_path: Path, kind: str, read: Callable[[Path], object]) -> None:
    make, said = STRANGE[kind]
    path = tmp_path / "picture.png"
    make(path)
    with time_limit(5), like_a_user(), pytest.raises(InputError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: wanted a picture (PNG, ")
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "nul\0"], ids=["name", "path", "nul"])
def test_a_name_that_no_file_system_takes(name: str) -> None:
    with pytest.raises(InputError) as refused:
        open_picture(name)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_the_listed_formats_are_opened_whatever_their_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.of.mine"
    Image.new("RGB", (9, 7), (255, 0, 0)).save(path, kind)
    check_picture(path)
    picture = open_picture(path)
    assert (picture.mode, picture.size) == ("RGB", (9, 7))
    assert picture.getpixel((4, 3))[0] > 250  # type: ignore[index]


@pytest.mark.parametrize("kind", ["pipe", "eps", "bomb"])
def test_a_first_frame_is_refused_before_anything_is_drawn(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "first.png"
    STRANGE[kind][0](path)
    with time_limit(60), pytest.raises(InputError, match=f"first-frame: .*{STRANGE[kind][1]}"):
        generate(Story.from_captions(["a fox"]), model="builtin", first_frame=path, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
