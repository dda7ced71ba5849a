"""`fastory eval`: measures of drawn stories."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fastory.cli.options import MODEL, OUTPUT, Device, Offline, option
from fastory.cli.progress import show_json
from fastory.cli.reporting import plain, quiet_libraries, reported, say, stderr

if TYPE_CHECKING:
    from fastory.evaluation.measures import Row


def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, or folders with a story file and frame-000.png ..", show_default=False
        ),
    ],
    clip: Annotated[
        str,
        option(MODEL, help="The CLIP model: a folder, or a hub id (default openai/clip-vit-base-patch32)."),
    ] = "openai/clip-vit-base-patch32",
    device: Device = "auto",
    offline: Offline = False,
    output: Annotated[
        Path | None, option(OUTPUT, "--output", "-o", help="A JSON file with every row.")
    ] = None,
    json_lines: Annotated[bool, option(OUTPUT, "--json", help="Print rows as JSON lines.")] = False,
) -> None:
    """Measure drawn stories: CLIP-T (picture and raw caption) and CLIP-I (pictures of a story with each other).

    A picture that cannot be read is a row with its reason.
    """
    with reported():
        rows = measured(runs, clip, device, offline, output)
        if json_lines:
            show_json(iter(rows))
        else:
            show_table(rows)
        if output is not None:
            from fastory import files

            table = json.dumps([{"kind": type(row).__name__, **asdict(row)} for row in rows], indent=1)
            files.atomic_write(output, (table + "\n").encode())
            if not json_lines:
                say(str(output))


def measured(runs: list[Path], clip: str, device: str, offline: bool, output: Path | None) -> list[Row]:
    """All rows. Raises InputError for folders, an encoder or an output that cannot be, before anything is measured."""
    from fastory import door
    from fastory.evaluation.stories import read_drawn
    from fastory.settings import check_placement

    check_placement(device, "auto", "auto")
    for run in runs:
        door.check_paths({"RUNS": run})
    door.check_new_file(output, "--output")
    stories = [read_drawn(run) for run in runs]
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    door.check_model("builtin", image_encoder=clip)
    quiet_libraries()
    from fastory.evaluation.clip import Clip
    from fastory.evaluation.measures import measure
    from fastory.runtime import choose_placement

    where = str(choose_placement(device, "float32", "off").device)
    return list(measure(Clip.open(clip, device=where, offline=offline), stories, clip))


def show_table(rows: list[Row]) -> None:
    """A table of stories on stdout, and frames without a figure as notes."""
    from fastory.evaluation.measures import FrameMeasured, StoryMeasured, Summary

    table = Table("story", "CLIP-T", "CLIP-I (self)", "frames")
    for row in rows:
        match row:
            case FrameMeasured(missing=str(why)):
                stderr.print(
                    f"  [yellow]note:[/] {plain(row.story)}, frame {row.frame}: {plain(why)}", soft_wrap=True
                )
            case StoryMeasured():
                table.add_row(
                    plain(row.story), *figures(row.clip_t, row.clip_i_self), f"{row.frames} of {row.of}"
                )
            case Summary():
                table.add_section()
                table.add_row("mean", *figures(row.clip_t, row.clip_i_self), f"{row.stories} stories")
    say_table(table)


def figures(*values: float | None) -> Iterator[str]:
    """Three decimals, a dash for none."""
    yield from ("-" if value is None else f"{value:.3f}" for value in values)


def say_table(table: Table) -> None:
    """On stdout, as wide as it has to be."""
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    Console(file=text, width=120).print(table)
    say(text.getvalue().rstrip())
