"""A finished run in forms to print, send and keep: PDF, a comic strip, an animated WebP or MP4, a zip of its pictures.

They depend on pictures and captions alone, so the same run gives the same bytes. Pictures are read one at a time where the
form allows it. Captions are drawn in Pillow's own font: what it lacks stands as an ellipsis, and the storybook has it.
"""

from __future__ import annotations

import math
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from fastory import files
from fastory.errors import InputError
from fastory.pictures import open_picture
from fastory.runs.film import write_film
from fastory.runs.lettering import font_of, inside, wrapped
from fastory.runs.manifest import NAME, picture_name, read_manifest, rounds_of
from fastory.runs.storybook import columns_of
from fastory.story import Story
from fastory.wording import shown

PAGE = (1240, 1754)  # px: A4 at 150 dots an inch
DPI = 150
MARGIN, GAP = 70, 30  # px of a page
MOST_ON_A_PAGE = 12
PAPER, INK, LINE = "#ffffff", "#1d1d1f", "#1d1d1f"
CAPTIONS = ("below", "box", "none")
CELL = 512  # px, the longer side of a strip's pictures
MOST_SIDE = 16_383  # px: WebP's, and enough for a strip
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in a zip: the run folder's pictures hold no time either
QUALITY = 92  # of a PDF's pictures


@dataclass(frozen=True)
class FinishedRun:
    """title; captions and final pictures, one a frame; pictures: of every round, by their names in the folder."""

    title: str
    captions: tuple[str, ...]
    final: tuple[Path, ...]
    pictures: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Layout:
    """How pictures share a page or a strip. captions: below them, in a box on them, or none. columns: 0 for what fits best."""

    per_page: int = 1
    captions: str = "below"
    columns: int = 0
    seconds: float = 1.5

    def check(self) -> None:
        """InputError for a value that cannot be."""
        if not 1 <= self.per_page <= MOST_ON_A_PAGE:
            raise InputError(f"--per-page: wanted 1 to {MOST_ON_A_PAGE}, got {self.per_page}")
        if self.captions not in CAPTIONS:
            raise InputError(f"--captions: wanted one of {', '.join(CAPTIONS)}, got {shown(self.captions)}")
        if not 0 <= self.columns <= 100:
            raise InputError(f"--columns: wanted 1 to 100, got {self.columns}")
        if not 0.02 <= self.seconds <= 60:
            raise InputError(f"--seconds: wanted 0.02 to 60, got {self.seconds}")


def read_finished(folder: Path) -> FinishedRun:
    """What is to be rendered. Raises InputError for what is no finished run folder, or one that is damaged."""
    manifest = read_manifest(folder / NAME)
    if not manifest["products"] or manifest.get("redraw"):
        raise InputError(f"{folder} is not finished; finish it with the command that drew it, then render it")
    count, rounds = len(manifest["story"]["frames"]), range(rounds_of(manifest["settings"]))
    final = tuple(folder / f"frames/frame-{i:03d}.png" for i in range(count))
    names = [picture_name(k, i) for k in rounds for i in range(count)]
    for file in (folder / "story.yaml", *final, *(folder / name for name in names)):
        if files.is_link_below(folder, file):
            raise InputError(f"{file} is reached through a symbolic link; move the link away")
    story = Story.read(folder / "story.yaml")
    if len(story.frames) != count:
        raise InputError(
            f"{folder / 'story.yaml'} has {len(story.frames)} frames and the run {count}: it was changed"
        )
    for file in final:
        digest = manifest["products"].get(file.relative_to(folder).as_posix())
        if not file.is_file() or files.sha256_of(file) != digest:
            raise InputError(f"{file} is missing or damaged; the command that drew the run makes it anew")
    there = [name for name in names if (folder / name).is_file()]
    kept = (*there, *(file.relative_to(folder).as_posix() for file in final))
    return FinishedRun(story.title, tuple(f.caption for f in story.frames), final, kept, folder)


def write_pdf(run: FinishedRun, path: Path, layout: Layout) -> None:
    """A4 pages in portrait, `per_page` pictures on each."""
    count = len(run.final)
    starts = range(0, count, layout.per_page)
    pages = (_page(run, range(start, min(count, start + layout.per_page)), layout) for start in starts)
    first = next(pages)
    when = time.gmtime(0)
    first.save(
        path,
        "PDF",
        save_all=True,
        append_images=pages,
        resolution=DPI,
        quality=QUALITY,
        title=run.title,
        creationDate=when,
        modDate=when,
    )


def _page(run: FinishedRun, frames: Sequence[int], layout: Layout) -> Image.Image:
    canvas = Image.new("RGB", PAGE, PAPER)
    columns = layout.columns or _columns_of_page(layout.per_page)
    rows = math.ceil(layout.per_page / columns)
    width = (PAGE[0] - 2 * MARGIN - (columns - 1) * GAP) // columns
    height = (PAGE[1] - 2 * MARGIN - (rows - 1) * GAP) // rows
    for number, i in enumerate(frames):
        at = (MARGIN + number % columns * (width + GAP), MARGIN + number // columns * (height + GAP))
        _panel(canvas, run, i, at, (width, height), layout.captions)
    return canvas


def _columns_of_page(count: int) -> int:
    """Pages are higher than wide, pictures mostly square."""
    return 1 if count <= 2 else 2 if count <= 8 else 3


def write_strip(run: FinishedRun, path: Path, layout: Layout) -> None:
    """One PNG, row after row; the pictures as large as they are, at most 512 px."""
    with Image.open(run.final[0]) as image:
        size = image.size
    columns = min(layout.columns or columns_of(len(run.final)), len(run.final))
    rows = math.ceil(len(run.final) / columns)
    side = min(CELL, max(256, *size))
    while True:
        width, height = inside(size, (side, side))
        letters = max(12, side // 22)
        text = 4 * (letters + 6) + 10 if layout.captions == "below" else 0
        whole = (columns * (width + GAP) + GAP, rows * (height + text + GAP) + GAP)
        if max(whole) <= MOST_SIDE or side <= 32:
            break
        side = side * 3 // 4
    canvas = Image.new("RGB", whole, PAPER)
    for i in range(len(run.final)):
        at = (GAP + i % columns * (width + GAP), GAP + i // columns * (height + text + GAP))
        _panel(canvas, run, i, at, (width, height + text), layout.captions)
    canvas.save(path, "PNG")


def _panel(
    canvas: Image.Image,
    run: FinishedRun,
    i: int,
    at: tuple[int, int],
    cell: tuple[int, int],
    captions: str,
) -> None:
    """A picture with a thin frame, and its caption below it or in a box on its foot, of four lines at most."""
    letters = max(12, min(30, cell[0] // 22))
    line, font = letters + 6, font_of(letters)
    below = 4 * line + 10 if captions == "below" else 0
    picture = open_picture(run.final[i])
    fitted = picture.resize(inside(picture.size, (cell[0], cell[1] - below)), Image.Resampling.LANCZOS)
    left, top = at[0] + (cell[0] - fitted.width) // 2, at[1]
    canvas.paste(fitted, (left, top))
    draw = ImageDraw.Draw(canvas)
    right, bottom = left + fitted.width, top + fitted.height
    draw.rectangle([left, top, right - 1, bottom - 1], outline=LINE, width=2)
    if captions == "none":
        return
    lines = wrapped(run.captions[i], font, fitted.width - (24 if captions == "box" else 0), 4)
    if captions == "box":
        height = len(lines) * line + 12
        draw.rectangle([left, bottom - height, right - 1, bottom - 1], PAPER, LINE, 2)
        draw.multiline_text(
            (left + 12, bottom - height + 9 - letters // 6), "\n".join(lines), INK, font, spacing=6
        )
    else:
        draw.multiline_text((left, bottom + 8), "\n".join(lines), INK, font, spacing=6)


def write_webp(run: FinishedRun, path: Path, layout: Layout) -> None:
    """The final pictures one after the other, without end; nothing of a picture is lost up to 256 px."""
    with Image.open(run.final[0]) as image:
        small = max(image.size) <= 256

    def rest() -> Iterator[Image.Image]:
        yield from (open_picture(file) for file in run.final[1:])

    open_picture(run.final[0]).save(
        path,
        "WEBP",
        save_all=True,
        append_images=rest(),
        duration=round(1000 * layout.seconds),
        loop=0,
        lossless=small,
        quality=90,
    )


def write_mp4(run: FinishedRun, path: Path, layout: Layout) -> None:
    """The final pictures one after the other, once, as a film of ffmpeg's."""
    with Image.open(run.final[0]) as image:
        size = image.size
    write_film((open_picture(file) for file in run.final), size, path, layout.seconds)


def write_zip(run: FinishedRun, path: Path, layout: Layout) -> None:
    """Every picture of every round under its name in the run folder, and the story file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in (*run.pictures, "story.yaml"):
            entry = zipfile.ZipInfo(name, EPOCH)
            archive.writestr(entry, (run.folder / name).read_bytes())


Write = Callable[[FinishedRun, Path, Layout], None]
FORMS: Mapping[str, tuple[Write, str]] = {
    "pdf": (write_pdf, ".pdf"),
    "strip": (write_strip, ".png"),
    "webp": (write_webp, ".webp"),
    "zip": (write_zip, ".zip"),
    "mp4": (write_mp4, ".mp4"),
}


def render(folder: Path, form: str, output: Path, layout: Layout) -> Path:
    """Write a finished run to `output` in one of FORMS. Raises InputError for a run that is not finished, or damaged."""
    layout.check()
    run = read_finished(folder)
    write = FORMS[form][0]
    files.atomic_write(output, lambda path: write(run, path, layout))
    return output
