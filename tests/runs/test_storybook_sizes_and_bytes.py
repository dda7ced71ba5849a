"""Any story must give a sheet and a page that open, and the same story the same bytes."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image

import fastory.runs.storybook
from fastory.runs.storybook import MAX_BYTES, MAX_SIDE, Page, write_sheet, write_storybook


def noise(path: Path, width: int, height: int, seed: int = 0) -> Path:
    values = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    Image.fromarray(values).save(path)
    return path


def flat(path: Path, colour: str, size: tuple[int, int] = (64, 64)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def sheet_of(pages: list[Page], folder: Path, title: str = "Title") -> Image.Image:
    write_sheet(pages, folder / "sheet.png", title=title)
    with Image.open(folder / "sheet.png") as image:
        assert image.format == "PNG" and image.info == {}  # no time, path or host
        assert max(image.size) <= MAX_SIDE
        return image.convert("RGB")


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.getcolors(2**24) or () if isinstance(colour, tuple)}


@pytest.mark.parametrize(
    ("frames", "rounds", "size"),
    [
        (1, 1, (64, 64)),
        (1, 11, (64, 64)),
        (2, 2, (1024, 576)),
        (7, 11, (64, 64)),
        (9, 200, (64, 64)),
        (100, 11, (512, 512)),
        (3, 11, (32, 512)),
        (40, 3, (512, 32)),
        (2000, 11, (8, 8)),
    ],
    ids=str,
)
def test_sheet_keeps_to_its_limit(tmp_path, frames, rounds, size):
    picture = flat(tmp_path / "a.png", "red", size)
    page = Page("A caption of some length, " * 5, (picture,) * rounds, picture)
    sheet = sheet_of([page] * frames, tmp_path)
    assert (255, 0, 0) in colours(sheet)


def test_sheet_shows_every_final_picture_and_its_rounds(tmp_path):
    finals = [flat(tmp_path / f"{i}.png", f"rgb({40 + i}, 0, 0)") for i in range(100)]
    first, middle = flat(tmp_path / "first.png", "lime"), flat(tmp_path / "middle.png", "blue")
    sheet = sheet_of(
        [Page(str(i), (first, middle, final), final) for i, final in enumerate(finals)], tmp_path
    )
    assert colours(sheet) >= {(40 + i, 0, 0) for i in range(100)} | {(0, 255, 0), (0, 0, 255)}


def test_sheet_shows_captions_and_what_was_left_out(tmp_path):
    red = flat(tmp_path / "red.png", "red")
    plain = sheet_of([Page("A fox.", (red, red), red)] * 4, tmp_path)
    assert sheet_of([Page("A box.", (red, red), red)] * 4, tmp_path).tobytes() != plain.tobytes()
    assert sheet_of([Page("A fox.", (None, red), red)] * 4, tmp_path).tobytes() != plain.tobytes()
    noted = sheet_of([Page("A fox.", (red, red), red, "black")] * 4, tmp_path)
    assert noted.height > plain.height


@pytest.mark.parametrize(
    "text", ["x" * 2000, "word " * 400, "\u202eשלום", "🦊🙂", "鬼" * 300, "<b>&", "é–ß", ""]
)
def test_sheet_takes_any_text(tmp_path, text):
    red = flat(tmp_path / "red.png", "red")
    one_line = sheet_of([Page("A", (red,), red)], tmp_path)
    sheet = sheet_of([Page(text, (red,), red)], tmp_path, title=text or "x")
    assert one_line.height <= sheet.height <= one_line.height + 100
    margin = sheet.crop((sheet.width - 40, 0, sheet.width, sheet.height))
    assert margin.getcolors() == [(40 * sheet.height, (255, 255, 255))]


def test_storybook_shrinks_pictures_to_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(fastory.runs.storybook, "MAX_BYTES", 400_000)
    pictures = tuple(noise(tmp_path / f"{k}.png", 300, 200, k) for k in range(4))
    pages = [Page("A caption.", pictures, pictures[-1])] * 6
    write_storybook(pages, tmp_path / "book.html", title="t", settings={})
    size = (tmp_path / "book.html").stat().st_size
    assert 200_000 < size <= 400_000
    assert (tmp_path / "book.html").read_text(encoding="utf-8").count("data:image/webp") == 6 * 4


def test_storybook_leaves_out_rounds_before_pictures_become_dust(tmp_path, monkeypatch):
    monkeypatch.setattr(fastory.runs.storybook, "MAX_BYTES", 200_000)
    picture = noise(tmp_path / "a.png", 64, 64)
    pages = [Page("A caption.", (picture,) * 51, picture)] * 6
    write_storybook(pages, tmp_path / "book.html", title="t", settings={})
    html = (tmp_path / "book.html").read_text(encoding="utf-8")
    assert (tmp_path / "book.html").stat().st_size <= 200_000
    shown = json.loads(html.partition('id="rounds">')[2].partition("</script>")[0])
    assert shown[0] == 0 and shown[-1] == 50 and 3 <= len(shown) < 51
    assert html.count("data:image/webp") == 6 * len(shown)


def test_small_pictures_are_embedded_without_loss(tmp_path):
    picture = noise(tmp_path / "a.png", 64, 64)
    assert (
        webps(tmp_path, Page("a", (picture, picture), picture))[0].tobytes() == Image.open(picture).tobytes()
    )


def test_pictures_have_the_promised_sizes(tmp_path):
    picture = flat(tmp_path / "a.png", "red", (2000, 1000))
    final, thumbnail = webps(tmp_path, Page("a", (picture, picture), picture))
    assert (final.size, thumbnail.size) == ((1024, 512), (384, 192))


def webps(folder: Path, page: Page) -> list[Image.Image]:
    write_storybook([page], folder / "book.html", title="t", settings={})
    html = (folder / "book.html").read_text(encoding="utf-8")
    found = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", html)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_other_picture_kinds_are_taken(tmp_path):
    paths = []
    for mode in ("L", "P", "RGBA", "1", "I;16"):
        paths.append(tmp_path / f"{mode[0]}.png")
        Image.new(mode, (9, 7)).save(paths[-1])
    pages = [Page("a", (path,), path) for path in paths]
    sheet_of(pages, tmp_path)
    write_storybook(pages, tmp_path / "book.html", title="t", settings={})


def test_same_story_same_bytes_in_another_process_and_folder(tmp_path):
    script = """
import sys
from pathlib import Path
from fastory.runs.storybook import Page, write_sheet, write_storybook
folder = Path(sys.argv[1])
pages = [Page(f"Frame {i}, é", (folder / "a.png", None, folder / "b.png"), folder / "b.png") for i in range(3)]
write_sheet(pages, folder / "out.partial", title="Title")
write_storybook(pages, folder / "book.partial", title="Title", settings={"steps": "50", "seed": "0"})
"""
    digests = set()
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        noise(folder / "a.png", 200, 150, 1)
        noise(folder / "b.png", 200, 150, 2)
        subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
        products = (folder / "out.partial").read_bytes(), (folder / "book.partial").read_bytes()
        assert str(tmp_path).encode() not in products[0] + products[1]
        digests.add(tuple(hashlib.sha256(product).hexdigest() for product in products))
    assert len(digests) == 1


@pytest.mark.slow
def test_a_hundred_frames_of_noise(tmp_path):
    """The worst a story can hold: 40 MB, and memory that does not follow the number of pictures."""
    for k in range(4):
        noise(tmp_path / f"{k}.png", 512, 512, k)
    script = """
import resource, sys
from pathlib import Path
from fastory.runs.storybook import Page, write_storybook
folder = Path(sys.argv[1])
pictures = tuple(folder / f"{k % 4}.png" for k in range(11))
frames = int(sys.argv[2])
write_storybook([Page("A caption.", pictures, pictures[-1])] * frames, folder / "book.html", title="t", settings={})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    kib = [
        int(subprocess.check_output([sys.executable, "-c", script, str(tmp_path), frames]))
        for frames in ("2", "100")
    ]
    assert MAX_BYTES / 2 < (tmp_path / "book.html").stat().st_size <= MAX_BYTES
    assert kib[1] - kib[0] < 100_000
