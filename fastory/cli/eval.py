"""`fastory eval`: measures of drawn stories."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fastory.cli.options import METHOD, MODEL, OUTPUT, Device, Offline, option
from fastory.cli.progress import show_json
from fastory.cli.reporting import plain, quiet_libraries, reported, say, stderr
from fastory.evaluation.choices import BUILTIN, CLIP_B32, MEASURES

if TYPE_CHECKING:
    from fastory.evaluation.rows import Measured

Metrics = Annotated[
    str | None,
    option(
        METHOD, metavar="NAME,..", help=f"What is measured: {', '.join(MEASURES)}, or all (default clip)."
    ),
]
Encoder = Annotated[
    str | None,
    option(
        MODEL,
        "--encoder",
        "--clip",
        help=f"The CLIP model: builtin, a folder, or a hub id (default {CLIP_B32}; builtin for the built-in model).",
    ),
]


def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, or folders with a story file and frame-000.png ..", show_default=False
        ),
    ],
    metrics: Metrics = None,
    encoder: Encoder = None,
    device: Device = "auto",
    offline: Offline = False,
    output: Annotated[
        Path | None,
        option(OUTPUT, "--output", "-o", help="A table: .json has every row, .md and .tex the means."),
    ] = None,
    json_lines: Annotated[bool, option(OUTPUT, "--json", help="Print rows as JSON lines.")] = False,
) -> None:
    """Measure drawn stories, each figure with what it was measured by and a 95 % interval over stories.

    A picture that cannot be read is a row with its reason. With --output the same command goes on where it was interrupted.
    """
    requested = locals()
    with reported(resumable=output is not None, kept="Measured stories"):
        rows = measured(requested)
        if json_lines:
            show_json(iter(rows))
        else:
            show_stories(rows)
            show_means(rows)
        if output is not None and not json_lines:
            say(str(output))


def measured(requested: dict[str, Any]) -> list[Measured]:
    """All rows, which are written where they should be.

    Raises InputError for folders, an encoder or an output that cannot be, before anything is measured.
    """
    from fastory import door, files
    from fastory.evaluation.choices import read_metrics
    from fastory.evaluation.stories import read_drawn
    from fastory.evaluation.tables import FORMS, check_form
    from fastory.settings import check_placement

    output = requested["output"]
    check_placement(requested["device"], "auto", "auto")
    metrics = read_metrics(requested["metrics"] or "clip")
    for run in requested["runs"]:
        door.check_paths({"RUNS": run})
    door.check_new_file(output, "--output")
    if output is not None:
        check_form(output)
    stories = [read_drawn(run) for run in requested["runs"]]
    if requested["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"
    encoder = encoder_of(requested["encoder"], None)
    quiet_libraries()
    from fastory.evaluation.journal import Journal
    from fastory.evaluation.measures import measure
    from fastory.runtime import choose_placement

    where = str(choose_placement(requested["device"], "float32", "off").device)
    measures = measures_of(metrics, encoder, where, requested["offline"])
    journal = Journal(None if output is None else output.with_name(output.name + files.UNFINISHED))
    rows = list(measure(stories, measures, journal))
    if output is not None:
        files.atomic_write(output, FORMS[output.suffix.lower()](rows).encode())
        journal.remove()
    return rows


def encoder_of(requested: str | None, model: str | None) -> str:
    """The encoder's name, checked. model: that draws the stories, where one does."""
    from fastory import door

    name = requested or (BUILTIN if model == BUILTIN else CLIP_B32)
    if name != BUILTIN:
        door.check_model(BUILTIN, image_encoder=name)
    return name


def measures_of(names: Sequence[str], encoder: str, device: str, offline: bool) -> list[Any]:
    """The measures of --metrics, opened. Raises InputError for weights that are not to be had."""
    from fastory.evaluation.clip import open_encoder
    from fastory.evaluation.judged import JudgeMeasure
    from fastory.evaluation.measures import ClipMeasure

    makers = {
        "clip": lambda: ClipMeasure(open_encoder(encoder, device=device, offline=offline)),
        "judge": JudgeMeasure,
    }
    return [makers[name]() for name in names]


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
    shown = Table("", *(tables.METRICS[name].title for name in found.metrics))
    for line in found.lines:
        cells = [tables.shown_value(found.cells.get((line, name)), interval=True) for name in found.metrics]
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
