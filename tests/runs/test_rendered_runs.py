"""Risk: what is rendered misses a frame, mixes captions up, differs from run to run, or takes or replaces a user's file."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folders import contents, draw, edit_manifest
from typer.testing import CliRunner

from fastory import InputError, Story, StoryModel
from fastory.cli import app
from fastory.runs.film import ffmpeg
from fastory.runs.render import (
    FORMS,
    MOST_SIDE,
    FinishedRun,
    Layout,
    render,
    write_mp4,
    write_pdf,
    write_strip,
)

HOSTILE = "a fox (is) \\ sleeping <b>) Tj ET \u202e in the snow ⵣ " + "x" * 500


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "snow"
    captions = [HOSTILE, "a fox is jumping in the forest", "a fox is standing on the beach"]
    draw(
        Story.from_captions(captions, title=HOSTILE),
        StoryModel.open("builtin"),
        folder,
        steps=1,
        iterations=1,
    )
    return folder


needs_ffmpeg = pytest.mark.skipif(ffmpeg() is None, reason="no ffmpeg on the PATH (apt install ffmpeg)")


def pages(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=needs_ffmpeg if form == "mp4" else ()) for form in FORMS]
)
def test_the_same_run_gives_the_same_bytes_and_is_left_alone(run: Path, tmp_path: Path, form: str) -> None:
    before = contents(run)
    files = [render(run, form, tmp_path / f"{n}.out", Layout()) for n in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert contents(run) == before


def test_every_frame_is_on_a_page(run: Path, tmp_path: Path) -> None:
    for per_page, count in ((1, 3), (2, 2), (4, 1)):
        pdf = render(run, "pdf", tmp_path / f"{per_page}.pdf", Layout(per_page=per_page)).read_bytes()
        assert pdf.startswith(b"%PDF-") and pages(pdf) == count
    assert b"\xfe\xff" in pdf or b"sleeping" in pdf  # its title
    assert pdf.count(b"(D:19700101") == 2  # and no time of its making


def test_a_strip_shows_the_frames_in_their_order(tmp_path: Path) -> None:
    colours = ["red", "green", "blue", "yellow", "black"]
    for colour in colours:
        Image.new("RGB", (128, 64), colour).save(tmp_path / f"{colour}.png")
    final = tuple(tmp_path / f"{colour}.png" for colour in colours)
    run = FinishedRun("Five", tuple(colours), final, (), tmp_path)
    write_strip(run, tmp_path / "strip.png", Layout(columns=2, captions="none"))
    with Image.open(tmp_path / "strip.png") as strip:
        middle = [
            strip.getpixel((30 + 128 + i % 2 * (256 + 30), 30 + 64 + i // 2 * (128 + 30))) for i in range(5)
        ]
    assert middle == [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in colours]
    many = FinishedRun("Many", tuple(colours) * 200, final * 200, (), tmp_path)
    write_strip(many, tmp_path / "many.png", Layout(captions="none", columns=100))
    with Image.open(tmp_path / "many.png") as strip:
        assert max(strip.size) <= MOST_SIDE


def test_a_caption_is_drawn_where_its_layout_says(tmp_path: Path) -> None:
    Image.new("RGB", (512, 512), "red").save(tmp_path / "red.png")
    run = FinishedRun("One", ("A caption.",), (tmp_path / "red.png",), (), tmp_path)

    def has_ink(captions: str) -> tuple[bool, bool]:
        """On the picture's foot, and below it."""
        write_strip(run, tmp_path / "one.png", Layout(captions=captions))
        with Image.open(tmp_path / "one.png") as strip:
            on = strip.crop((40, 490, 530, 535)).convert("L")
            below = strip.crop((30, 545, 540, strip.height)).convert("L")
        return on.getextrema()[1] == 255, below.getextrema()[0] < 255

    assert (has_ink("below"), has_ink("box"), has_ink("none")) == (
        (False, True),
        (True, False),
        (False, False),
    )


@needs_ffmpeg
def test_a_film_shows_every_frame_as_long_as_it_is_told(tmp_path: Path) -> None:
    """Decoded again: 25 pictures a second, of a size that loses its odd pixel."""
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    for number, colour in enumerate(colours):
        Image.new("RGB", (65, 48), colour).save(tmp_path / f"{number}.png")
    final = tuple(tmp_path / f"{number}.png" for number in range(3))
    write_mp4(FinishedRun("Three", ("",) * 3, final, (), tmp_path), tmp_path / "a.mp4", Layout(seconds=0.4))
    command = [
        ffmpeg(),
        "-loglevel",
        "error",
        "-i",
        tmp_path / "a.mp4",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    shown = np.frombuffer(data, np.uint8).reshape(-1, 48, 64, 3)
    assert len(shown) == 30
    for number, colour in enumerate(colours):
        # H.264 in yuv420p: a few levels of 255 for the rounding of its colours, none for another picture's.
        assert abs(shown[10 * number + 5].mean((0, 1)) - colour).max() < 8


def test_without_ffmpeg_a_film_is_refused_and_nothing_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, ["render", str(run), "--mp4", "-o", str(tmp_path / "a.mp4")])
    assert result.exit_code == 2 and "wanted ffmpeg on the PATH, got none" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_webp_plays_every_frame(run: Path, tmp_path: Path) -> None:
    with Image.open(render(run, "webp", tmp_path / "a.webp", Layout(seconds=0.5))) as played:
        assert played.n_frames == 3  # type: ignore[attr-defined]
        for i in range(3):
            played.seek(i)
            with Image.open(run / f"frames/frame-{i:03d}.png") as final:
                assert played.convert("RGB").tobytes() == final.convert("RGB").tobytes()


def test_a_zip_has_every_picture_and_the_story(run: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(render(run, "zip", tmp_path / "a.zip", Layout())) as archive:
        names = archive.namelist()
        assert archive.read("iteration-01/frame-002.png") == (run / "iteration-01/frame-002.png").read_bytes()
    assert len(names) == 3 + 3 + 3 + 1 and "story.yaml" in names


def test_what_is_not_finished_or_damaged_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "frames/frame-001.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"frame-001\.png is missing or damaged"):
        render(copy, "pdf", tmp_path / "a.pdf", Layout())
    edit_manifest(copy, lambda manifest: manifest.update(products={}))
    with pytest.raises(InputError, match="is not finished"):
        render(copy, "pdf", tmp_path / "a.pdf", Layout())
    assert not (tmp_path / "a.pdf").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}"], "wanted one of --pdf"),
        (["{run}", "--pdf", "--zip"], "got 2"),
        (["{run}", "--pdf", "--per-page", "0"], "--per-page: wanted 1 to 12, got 0"),
        (["{run}", "--strip", "--captions", "beside"], "--captions: wanted one of below, box, none"),
        (["{run}", "--webp", "--seconds", "nan"], "--seconds: wanted 0.02 to 60"),
        (["{run}", "--pdf", "-o", "{there}"], "exists; wanted a name that is free"),
        (["nowhere", "--pdf"], "manifest.json: wanted the manifest of a run folder"),
    ],
    ids=str,
)
def test_a_wrong_word_is_refused_at_the_door(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pdf").write_text("mine")
    named = {"run": str(run), "there": "there.pdf"}
    done = CliRunner().invoke(app, ["render", *(argument.format(**named) for argument in arguments)])
    assert done.exit_code == 2 and said in " ".join(done.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["there.pdf"]
    assert (tmp_path / "there.pdf").read_text() == "mine"


def test_a_caption_is_no_markup_of_a_pdf(run: Path, tmp_path: Path) -> None:
    """Captions are drawn; the title alone is text in the file, and closes no string of it."""
    hostile = FinishedRun(
        "x) /OpenAction << /S /JavaScript >> (", (HOSTILE,), (run / "frames/frame-000.png",), (), run
    )
    write_pdf(hostile, tmp_path / "a.pdf", Layout())
    data = (tmp_path / "a.pdf").read_bytes()
    title = data[data.index(b"/Title") :].split(b"endobj")[0]
    assert b"x) /OpenAction" not in title
    assert pages(data) == 1
