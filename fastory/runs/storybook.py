"""What a finished story is looked at with: a contact sheet, and a storybook in one HTML file that needs no other.

Both depend on pictures and texts alone, so the same story gives the same bytes. Pictures are read one at a time.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image, ImageDraw

from fastory.runs.lettering import font_of, inside, wrapped


@dataclass(frozen=True)
class Page:
    """A frame as it is shown.

    pictures: one path a round, None where the frame was not drawn or was left out.
    final: the finished picture; it stands for the last round.
    note: what a reader should know about the frame, such as why a round left it out.
    """

    caption: str
    pictures: tuple[Path | None, ...]
    final: Path
    note: str = ""


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of 0..count-1 at even distances, the last always and the first if two may stay."""
    if limit >= count:
        return list(range(count))
    if limit <= 1:
        return [count - 1]
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


# The contact sheet: the final pictures with their captions; under them how some came about, a row for each round.

MAX_SIDE = 8192  # px
_CELLS = (480, 400, 320, 280, 240, 200, 160, 128, 96, 64)  # px, tried in turn
_MARGIN, _GAP, _HEAD, _LABEL = 48, 16, 104, 88  # px
_CAPTION_LINES, _SAMPLE_FRAMES, _SAMPLE_ROUNDS, _SAMPLE_SIDE = 4, 12, 6, 200
_PAPER, _INK, _FAINT, _EMPTY = "#ffffff", "#1d1d1f", "#6e6e73", "#ececef"


def write_sheet(pages: Sequence[Page], path: Path, *, title: str) -> None:
    """Write the contact sheet as PNG, at most 8192 px a side.

    Above, the final pictures with their captions (an even selection where not all fit); below, for up to twelve
    frames and six rounds, a row for each round. Captions of more than four lines end in an ellipsis, and one stands
    for letters that Pillow's own font lacks: the storybook has them in full.
    """
    sheet = _plan(pages)
    canvas = Image.new("RGB", (sheet.width, sheet.height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    heading = wrapped(title, font_of(40), sheet.width - 2 * _MARGIN, 1)
    draw.text((_MARGIN, _MARGIN - 8), heading[0], _INK, font_of(40))
    draw.text((_MARGIN, _MARGIN + 50), _summary(pages, len(sheet.frames)), _FAINT, font_of(18))
    tops = sheet.tops
    for index, (i, caption) in enumerate(zip(sheet.frames, sheet.captions, strict=True)):
        x = _MARGIN + index % sheet.columns * (sheet.cell[0] + _GAP)
        y = tops[index // sheet.columns]
        _paste(canvas, draw, pages[i].final, (x, y), sheet.cell)
        draw.multiline_text(
            (x, y + sheet.cell[1] + 8), "\n".join(caption), _INK, font_of(sheet.size), spacing=5
        )
    if sheet.rounds:
        _draw_rounds(canvas, draw, pages, sheet)
    canvas.save(path, format="PNG")


@dataclass(frozen=True)
class _Sheet:
    """What goes where, in px."""

    columns: int
    cell: tuple[int, int]
    frames: list[int]
    captions: list[list[str]]
    size: int  # of the captions' letters
    samples: list[int]
    rounds: list[int]
    sample: tuple[int, int]

    @property
    def width(self) -> int:
        return _content_width(self.columns, self.cell[0]) + 2 * _MARGIN

    @property
    def tops(self) -> list[int]:
        """Of each row of frames, and of what follows them."""
        tops = [_MARGIN + _HEAD]
        for start in range(0, len(self.frames), self.columns):
            lines = max(map(len, self.captions[start : start + self.columns]))
            text = 8 + lines * (self.size + 8) if lines else 0
            tops.append(tops[-1] + self.cell[1] + text + _GAP)
        return tops

    @property
    def height(self) -> int:
        rows = 48 + len(self.rounds) * (self.sample[1] + _GAP // 2) if self.rounds else 0
        return self.tops[-1] + _GAP + rows + _MARGIN // 2


def _content_width(columns: int, cell: int) -> int:
    return max(columns * (cell + _GAP) - _GAP, 640)


def _plan(pages: Sequence[Page]) -> _Sheet:
    """The largest cells that keep a screen's width for few frames and MAX_SIDE for any number."""
    with Image.open(pages[0].final) as image:
        size = image.size
    shown = len(pages)
    while True:
        columns = columns_of(shown)
        for side in _CELLS:
            rows_height = math.ceil(shown / columns) * (_fit(size, side)[1] + _GAP)
            wide = _content_width(columns, _fit(size, side)[0]) > min(
                max(1984, 240 * columns), MAX_SIDE - 2 * _MARGIN
            )
            # small pictures enlarged further turn to fog; the rest saves wrapping captions in vain
            if side > max(240, 4 * max(size)) or wide or rows_height > MAX_SIDE:
                continue
            sheet = _plan_with(pages, _spread(len(pages), shown), columns, side, size)
            if sheet.height <= MAX_SIDE:
                return sheet
        shown = shown * 3 // 4


def _plan_with(
    pages: Sequence[Page], frames: list[int], columns: int, side: int, size: tuple[int, int]
) -> _Sheet:
    cell = _fit(size, side)
    letters = 18 if side >= 240 else 14
    captions = [_caption(pages[i], i, cell[0], letters) if side >= 128 else [] for i in frames]
    rounds = len(pages[0].pictures)
    room = _content_width(columns, cell[0]) - _LABEL
    samples = _spread(len(pages), min(_SAMPLE_FRAMES, room // 72))
    sample = _fit(size, min(_SAMPLE_SIDE, room // len(samples) - _GAP // 2))
    shown_rounds = _spread(rounds, _SAMPLE_ROUNDS) if rounds > 1 else []
    return _Sheet(columns, cell, frames, captions, letters, samples, shown_rounds, sample)


def columns_of(count: int) -> int:
    """A sheet somewhat wider than high, with the fullest last row."""
    ideal = math.sqrt(1.6 * count)
    choices = range(max(1, min(count, int(0.8 * ideal))), min(count, math.ceil(1.2 * ideal)) + 1)
    return min(choices, key=lambda c: (-count % c, abs(c - ideal)))


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A picture's size with `side` as the longer side."""
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _caption(page: Page, i: int, width: int, letters: int) -> list[str]:
    lines = wrapped(f"{i}  {page.caption}", font_of(letters), width, _CAPTION_LINES)
    return lines + (wrapped(f"({page.note})", font_of(letters), width, 1) if page.note else [])


def _summary(pages: Sequence[Page], shown: int) -> str:
    frames = f"{len(pages)} frame" + "s" * (len(pages) > 1)
    rounds = len(pages[0].pictures)
    parts = [frames if shown == len(pages) else f"{shown} of {frames}"]
    parts += [f"rounds 0 to {rounds - 1}"] if rounds > 1 else []
    return ", ".join(parts)


def _draw_rounds(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, pages: Sequence[Page], sheet: _Sheet
) -> None:
    top = sheet.tops[-1] + _GAP
    draw.line([(_MARGIN, top), (sheet.width - _MARGIN, top)], _EMPTY, 2)
    step = sheet.sample[0] + _GAP // 2
    for column, i in enumerate(sheet.samples):
        x = _MARGIN + _LABEL + column * step
        draw.text((x + sheet.sample[0] // 2, top + 16), str(i), _FAINT, font_of(16), anchor="ma")
        for row, k in enumerate(sheet.rounds):
            y = top + 44 + row * (sheet.sample[1] + _GAP // 2)
            _paste(canvas, draw, pages[i].pictures[k], (x, y), sheet.sample)
    for row, k in enumerate(sheet.rounds):
        y = top + 44 + row * (sheet.sample[1] + _GAP // 2) + sheet.sample[1] // 2
        draw.text((_MARGIN, y), f"round {k}", _FAINT, font_of(16), anchor="lm")


def _paste(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    path: Path | None,
    at: tuple[int, int],
    cell: tuple[int, int],
) -> None:
    if path is None:
        draw.rectangle([at, (at[0] + cell[0] - 1, at[1] + cell[1] - 1)], _EMPTY)
        if cell[0] >= 64:
            middle = (at[0] + cell[0] // 2, at[1] + cell[1] // 2)
            draw.text(middle, "left out", _FAINT, font_of(14), anchor="mm")
        return
    with Image.open(path) as image:
        fitted = image.convert("RGB").resize(inside(image.size, cell), Image.Resampling.LANCZOS)
    canvas.paste(fitted, (at[0] + (cell[0] - fitted.width) // 2, at[1] + (cell[1] - fitted.height) // 2))


# The storybook. Every picture has a share of the page's bytes and keeps to it by itself, so the page is written as the
# pictures are read.

MAX_BYTES = 40_000_000
_THUMBNAIL, _FINAL = 384, 1024  # px, the longer side
_FINAL_SHARE = (_FINAL / _THUMBNAIL) ** 2  # a final picture's bytes for one of a thumbnail's
_LEAST_SHARE = 800  # bytes of a thumbnail; below it rounds are left out instead
_QUALITIES = (82, 50)  # of WebP, tried in turn; then the picture shrinks
_SMALLEST = 16  # px
_LOSSLESS = 128  # px; WebP's halved colour resolution would show on pictures this small


def write_storybook(pages: Sequence[Page], path: Path, *, title: str, settings: Mapping[str, str]) -> None:
    """Write the storybook: one HTML file of at most 40 MB that loads nothing from elsewhere.

    settings: shown at the foot of the page, in the given order.
    The page holds WebP thumbnails (up to 384 px) of every round and the final pictures (up to 1024 px), smaller where
    the story is long. A slider goes through the rounds, and a click enlarges; without scripts the final pictures show.
    """
    template = page_template("fastory.runs", "storybook")
    context = {"title": title, "settings": settings, "count": len(pages)}
    rounds = len(pages[0].pictures)
    bare = template.generate(**context, rounds=list(range(rounds)), frames=_bare_frames(pages))
    # Base64 writes three bytes as four characters
    room = (MAX_BYTES - sum(len(part.encode()) for part in bare)) * 3 // 4
    shares = room / len(pages)
    shown = _spread(rounds, max(1, int(shares / _LEAST_SHARE - _FINAL_SHARE) + 1))
    share = int(shares / (len(shown) - 1 + _FINAL_SHARE)) - 64  # less the prefix of a data URI
    frames = _frames(pages, shown, share)
    with path.open("wb") as file:
        template.stream(**context, rounds=shown, frames=frames).dump(file, encoding="utf-8")


@dataclass(frozen=True)
class Embedded:
    """A picture within a page. width, height: px."""

    uri: str
    width: int
    height: int


def _frames(pages: Sequence[Page], shown: list[int], share: int) -> Iterator[dict[str, object]]:
    for page in pages:
        # the final picture stands for the last round
        earlier = (page.pictures[k] for k in shown[:-1])
        yield {
            "caption": page.caption,
            "note": page.note,
            "final": embedded(page.final, _FINAL, int(share * _FINAL_SHARE)),
            "earlier": (path and embedded(path, _THUMBNAIL, share).uri for path in earlier),
        }


def _bare_frames(pages: Sequence[Page]) -> Iterator[dict[str, object]]:
    for page in pages:
        empty = ("" for _ in page.pictures)
        yield {
            "caption": page.caption,
            "note": page.note,
            "final": Embedded("", 1024, 1024),
            "earlier": empty,
        }


def embedded(path: Path, side: int, share: int) -> Embedded:
    """A picture as WebP of at most `share` bytes, unless even the smallest has more."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = _webp(image, lossless=True) if max(image.size) <= _LOSSLESS else b""
    for quality in _QUALITIES:
        if not data or len(data) > share:
            data = _webp(image, quality=quality)
    while len(data) > share and max(image.size) > _SMALLEST:
        # bytes follow the number of pixels, so that one or two attempts are enough
        smaller = max(_SMALLEST, int(max(image.size) * min(0.9, math.sqrt(share / len(data)))))
        image.thumbnail((smaller, smaller), Image.Resampling.LANCZOS)
        data = _webp(image, quality=_QUALITIES[-1])
    uri = "data:image/webp;base64," + base64.b64encode(data).decode("ascii")
    return Embedded(uri, *image.size)


def _webp(image: Image.Image, *, lossless: bool = False, quality: int = 80) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=lossless, quality=quality, method=4)
    return buffer.getvalue()


def page_template(package: str, name: str) -> Template:
    """templates/NAME.html.j2 of a package, which has NAME.css and NAME.js as `style` and `script`; either may be missing."""
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    loader = environment.loader
    assert loader is not None
    there = set(loader.list_templates())
    # The page's policy admits this style and this script alone: nothing that a caption says can run.
    for kind, file in (("style", f"{name}.css"), ("script", f"{name}.js")):
        environment.globals[kind] = loader.get_source(environment, file)[0] if file in there else ""
    environment.filters["sha256"] = _policy_hash
    return environment.get_template(f"{name}.html.j2")


def _policy_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
