"""`fastory render`: a finished run to print, send and keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastory.cli.options import OUTPUT, PICTURE, among, option
from fastory.cli.reporting import reported, say
from fastory.errors import InputError

CAPTIONS = ("below", "box", "none")


def render(
    run: Annotated[Path, typer.Argument(help="A finished run folder.", show_default=False)],
    pdf: Annotated[bool, option(OUTPUT, "--pdf", help="A4 pages.")] = False,
    strip: Annotated[bool, option(OUTPUT, "--strip", help="A comic strip as one PNG.")] = False,
    webp: Annotated[bool, option(OUTPUT, "--webp", help="An animated WebP.")] = False,
    zip_: Annotated[bool, option(OUTPUT, "--zip", help="Every picture of every round.")] = False,
    mp4: Annotated[bool, option(OUTPUT, "--mp4", help="A film, by the ffmpeg of this machine.")] = False,
    output: Annotated[
        Path | None,
        option(OUTPUT, "--output", "-o", help="The file (default: named as the run folder, here)."),
    ] = None,
    per_page: Annotated[int, option(PICTURE, help="--pdf: pictures on a page, 1 to 12 (default 1).")] = 1,
    columns: Annotated[
        int, option(PICTURE, help="Pictures side by side (default: as many as fit well).")
    ] = 0,
    captions: Annotated[
        str,
        option(
            PICTURE,
            metavar=f"[{'|'.join(CAPTIONS)}]",
            autocompletion=among(CAPTIONS),
            help="Below a picture, in a box on it, or none (default below).",
        ),
    ] = "below",
    seconds: Annotated[float, option(PICTURE, help="--webp, --mp4: of a picture (default 1.5).")] = 1.5,
) -> None:
    """Write a finished run as PDF, comic strip, animated WebP, MP4 or zip."""
    with reported():
        from fastory import door
        from fastory.runs.render import FORMS, Layout
        from fastory.runs.render import render as write

        chosen = [name for name, wanted in zip(FORMS, (pdf, strip, webp, zip_, mp4), strict=True) if wanted]
        if len(chosen) != 1:
            raise InputError(f"wanted one of {', '.join('--' + name for name in FORMS)}, got {len(chosen)}")
        door.check_paths({"RUN": run, "--output": output})
        target = output or Path(run.resolve().name + FORMS[chosen[0]][1])
        door.check_new_file(target, "--output")
        say(str(write(run, chosen[0], target, Layout(per_page, captions, columns, seconds))))
