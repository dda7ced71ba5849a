"""`fastory eval`: measures of drawn stories."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from fastory.cli.options import METHOD, MODEL, OUTPUT, Device, Offline, option
from fastory.cli.progress import show_json
from fastory.cli.reporting import plain, quiet_libraries, reported, say, stderr
from fastory.evaluation.choices import (
    ALL,
    BUILTIN,
    CLIP_B32,
    DINO_SMALL,
    GROUNDING_DINO,
    MEASURES,
    NOT_COMPUTED,
    Instruments,
    read_metrics,
)

if TYPE_CHECKING:
    from fastory.evaluation.instruments import Opened
    from fastory.evaluation.rows import Measured
    from fastory.evaluation.stories import DrawnStory

MOST_INTERVALS = 6  # columns of a table on the screen, with intervals
Metrics = Annotated[
    str | None,
    option(METHOD, metavar="NAME,..", help=f"What is measured: {', '.join(MEASURES)}, or all that can be."),
]
Encoder = Annotated[
    str | None,
    option(
        MODEL,
        "--encoder",
        "--clip",
        help=f"The CLIP model: builtin, a folder, or a hub id (default {CLIP_B32}).",
    ),
]
DetectorName = Annotated[
    str | None,
    option(
        MODEL,
        "--detector",
        help=f"Finds characters: boxes (of the story), builtin, a folder, or a hub id (default {GROUNDING_DINO}).",
    ),
]
FeaturesName = Annotated[
    str | None,
    option(
        MODEL,
        "--features",
        help="Of FID, KID and aFID: inception, the file of its weights, or encoder (default inception).",
    ),
]
DinoName = Annotated[
    str | None, option(MODEL, "--dino", help=f"A folder or a hub id (default {DINO_SMALL}).")
]
Truth = Annotated[Path | None, option(METHOD, help="A folder of true pictures, for FID, KID and clip_i.")]


def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, folders with a story file and frame-000.png .., or runs of ViStoryBench.",
            show_default=False,
        ),
    ],
    metrics: Metrics = None,
    captions: Annotated[
        Path | None,
        option(METHOD, help="Story files, called as the folders, for folders of pictures without one."),
    ] = None,
    truth: Truth = None,
    encoder: Encoder = None,
    detector: DetectorName = None,
    features: FeaturesName = None,
    dino: DinoName = None,
    device: Device = "auto",
    offline: Offline = False,
    output: Annotated[
        Path | None,
        option(OUTPUT, "--output", "-o", help="A table: .json has every row, .md and .tex the means."),
    ] = None,
    export_vistorybench: Annotated[
        Path | None,
        option(
            OUTPUT, metavar="DIR", help="Write the pictures there, too, as ViStoryBench's reader takes them."
        ),
    ] = None,
    json_lines: Annotated[bool, option(OUTPUT, "--json", help="Print rows as JSON lines.")] = False,
) -> None:
    """Measure drawn stories, each figure with what it was measured by and a 95 % interval over stories.

    A picture that cannot be read is a row with its reason. With --output the same command goes on where it was interrupted.
    """
    requested = locals()
    with reported(resumable=output is not None, kept="Measured stories"):
        stories, wanted = opened(requested)
        rows = measured(stories, wanted, requested)
        exported = exported_to(stories, export_vistorybench)
        if json_lines:
            show_json(iter(rows))
        else:
            show_stories(rows)
            show_means(rows)
        if output is not None and not json_lines:
            say(str(output))
        if exported is not None:
            stderr.print(f"  [yellow]note:[/] {plain(NOT_COMPUTED)}", soft_wrap=True)
            if not json_lines:
                say(str(exported))


def opened(requested: Mapping[str, Any]) -> tuple[list[DrawnStory], Instruments]:
    """The stories, and what is to be measured. Raises InputError for what cannot be, before PyTorch is imported."""
    from fastory import door
    from fastory.evaluation.stories import read_drawn
    from fastory.evaluation.tables import check_form
    from fastory.settings import check_placement

    output = requested["output"]
    check_placement(requested["device"], "auto", "auto")
    metrics = read_metrics(requested["metrics"] or "clip")
    for run in requested["runs"]:
        door.check_paths({"RUNS": run})
    door.check_paths(
        {"--captions": requested["captions"], "--export-vistorybench": requested["export_vistorybench"]}
    )
    if output is None or not kept_beside(output).exists():
        door.check_new_file(output, "--output")
    if output is not None:
        check_form(output)
    stories = [story for run in requested["runs"] for story in read_drawn(run, requested["captions"])]
    return stories, instruments(requested, metrics)


def instruments(requested: Mapping[str, Any], metrics: Sequence[str], builtin: bool = False) -> Instruments:
    """What these options name, checked. builtin: whether no encoder means the built-in model's."""
    names = ("encoder", "detector", "features", "dino", "truth", "offline")
    named = {name: requested[name] for name in names}
    if builtin:
        named["encoder"] = named["encoder"] or BUILTIN
    wanted = Instruments.of(metrics, **named)
    if not everything(requested):
        wanted.check()
    if wanted.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return wanted


def everything(requested: Mapping[str, Any]) -> bool:
    """Whether all is wanted that can be measured."""
    return ALL in (requested["metrics"] or "").split(",")


def measured(stories: list[DrawnStory], wanted: Instruments, requested: Mapping[str, Any]) -> list[Measured]:
    """All rows, which are written where they should be. Raises InputError for weights that are not to be had."""
    quiet_libraries()
    from fastory import door, files
    from fastory.evaluation.journal import Journal
    from fastory.evaluation.measures import measure
    from fastory.evaluation.tables import FORMS
    from fastory.runtime import choose_placement

    output = requested["output"]
    where = str(choose_placement(requested["device"], "float32", "off").device)
    found = measures(replace(wanted, device=where), requested)
    journal = Journal(None if output is None else kept_beside(output))
    rows = list(measure(stories, found.measures, journal, found.of_all))
    if output is not None:
        table = FORMS[output.suffix.lower()](rows).encode()
        if not (
            output.is_file() and output.read_bytes() == table
        ):  # that of a run which was killed right after
            door.check_new_file(output, "--output")
            files.atomic_write(output, table)
        journal.remove()
    return rows


def kept_beside(output: Path) -> Path:
    """Where what was measured is kept until the table is written."""
    from fastory import files

    return output.with_name(output.name + files.UNFINISHED)


def measures(wanted: Instruments, requested: Mapping[str, Any]) -> Opened:
    """The measures, opened; of all that are wanted those that can be, the others as notes."""
    from fastory.evaluation.instruments import open_measures

    found = open_measures(wanted, whatever_there_is=everything(requested))
    for line in found.missing:
        stderr.print(f"  [yellow]note:[/] {plain(line)}", soft_wrap=True)
    return found


def exported_to(stories: list[DrawnStory], folder: Path | None) -> Path | None:
    """Where the pictures were written for ViStoryBench, if they should be."""
    if folder is None:
        return None
    from fastory.evaluation.vistory import export

    return export(stories, folder, when=datetime.now(UTC).strftime("%Y%m%d_%H%M%S"))


def show_stories(rows: Sequence[Measured]) -> None:
    """Frames without a figure as notes, and a table of stories on stdout."""
    from fastory.evaluation.tables import METRICS, shown_value

    for row in rows:
        if row.kind == "frame" and row.missing:
            said = f"{plain(row.story)}, frame {row.frame}: {plain(row.missing)}"
            stderr.print(f"  [yellow]note:[/] {said}", soft_wrap=True)
    stories = [row for row in rows if row.kind == "story"]
    metrics = list(dict.fromkeys(row.metric for row in stories))
    table = Table("story", *(METRICS[name].title for name in metrics), "frames")
    for folder in dict.fromkeys(row.folder for row in stories):
        found = {row.metric: row for row in stories if row.folder == folder}
        first = next(iter(found.values()))
        figures = [shown_value(found.get(name)) for name in metrics]
        table.add_row(plain(first.story), *figures, f"{first.count} of {first.of}")
    say_table(table)


def show_means(rows: Sequence[Measured]) -> None:
    """A table of means on stdout, and what must be read beside it as notes."""
    from fastory.evaluation import tables

    found = tables.Table.of(rows)
    shown = Table(Column(no_wrap=True), *(tables.METRICS[name].title for name in found.metrics))
    narrow = (
        len(found.metrics) <= MOST_INTERVALS
    )  # more of them would not stand side by side; tables have them
    for line in found.lines:
        cells = [tables.shown_value(found.cells.get((line, name)), interval=narrow) for name in found.metrics]
        shown.add_row(plain(tables.line_title(line)), *(plain(cell) for cell in cells))
    say_table(shown)
    for note in found.notes():
        stderr.print(f"  [yellow]note:[/] {plain(note)}", soft_wrap=True)


def say_table(table: Table) -> None:
    """On stdout, as wide as it has to be."""
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    Console(file=text, width=200).print(table)
    say(text.getvalue().rstrip())
