"""`fastory compare`: methods drawn and measured on the same stories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastory.cli.eval import (
    DetectorName,
    DinoName,
    Encoder,
    FeaturesName,
    Metrics,
    Truth,
    instruments,
    measures,
    show_means,
)
from fastory.cli.generate import (
    BatchSize,
    Graphs,
    GuidanceScale,
    NegativePrompt,
    Noise,
    Scheduler,
    Seed,
    Steps,
    Style,
)
from fastory.cli.options import (
    METHOD,
    OUTPUT,
    Adapter,
    Config,
    Device,
    Distilled,
    Dtype,
    ImageEncoder,
    IpAdapter,
    JsonLines,
    Loras,
    ModelName,
    ModelOptions,
    Offline,
    Quiet,
    option,
)
from fastory.cli.progress import show_json
from fastory.cli.reporting import plain, reported, say, stderr

if TYPE_CHECKING:
    from fastory.evaluation.compare import Comparison
    from fastory.evaluation.instruments import Opened
    from fastory.evaluation.rows import Measured
    from fastory.story import Story

Stories = Annotated[
    list[Path],
    typer.Argument(
        help="Story files, folders of them, .jsonl files with a story a line, or names of bundled examples.",
        show_default=False,
    ),
]
Methods = Annotated[
    str,
    option(
        METHOD,
        "--methods",
        metavar="WORD[+SETTING=VALUE],..",
        help="Modes and presets, each with settings of its own: iterative,iterative+reference_scale=0.3:0.3,causal.",
    ),
]
Rounds = Annotated[
    str | None,
    option(
        METHOD,
        metavar="0,1,3,5,10",
        help="Rounds to measure; as many as the last one are drawn (default: the last).",
    ),
]
Directory = Annotated[
    Path, option(OUTPUT, "--output", "-o", help="A folder for run folders, tables and the page.")
]


def compare(
    stories: Stories,
    methods: Methods,
    output: Directory,
    rounds: Rounds = None,
    metrics: Metrics = None,
    truth: Truth = None,
    encoder: Encoder = None,
    detector: DetectorName = None,
    features: FeaturesName = None,
    dino: DinoName = None,
    model: ModelName = "builtin",
    config: Config = None,
    ip_adapter: IpAdapter = None,
    image_encoder: ImageEncoder = None,
    adapter: Adapter = None,
    lora: Loras = None,
    distilled: Distilled = None,
    offline: Offline = False,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    scheduler: Scheduler = None,
    seed: Seed = None,
    noise: Noise = None,
    style: Style = None,
    negative_prompt: NegativePrompt = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    graphs: Graphs = "auto",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    json_lines: JsonLines = False,
) -> None:
    """Draw the same stories by several methods and measure them: table.json, .md, .tex, and page.html with pictures and curves.

    The same command goes on where it was interrupted, and keeps what is finished.
    """
    requested = locals()
    with reported(resumable=True), ExitStack() as stack:
        comparison, found = opened(requested)
        stack.enter_context(comparison)
        draw(comparison, batch_size, quiet or json_lines)
        rows = list(comparison.measure(found.measures, found.of_all))
        written = write(comparison, rows)
        if json_lines:
            show_json(iter(rows))
            return
        if not quiet:
            show_means(rows)
        for path in written if not quiet else written[-1:]:
            say(str(path))


def opened(requested: Mapping[str, Any]) -> tuple[Comparison, Opened]:
    """The comparison and its measures. Raises InputError for what cannot be, before anything is drawn or written."""
    from fastory import door
    from fastory.evaluation.choices import BUILTIN, read_metrics
    from fastory.evaluation.methods import parse_rounds, read_methods
    from fastory.settings import Settings

    settings = {field.name: requested[field.name] for field in fields(Settings) if field.name in requested}
    door.check_flags(settings, None)
    door.check_placement(
        requested["device"], requested["dtype"], requested["graphs"], requested["batch_size"]
    )
    methods = read_methods(requested["methods"], parse_rounds(requested["rounds"]))
    own = requested["model"] == BUILTIN
    metrics = read_metrics(requested["metrics"] or ("clip,judge" if own else "clip"))
    stories = read(requested["stories"])
    door.check_stories(stories, requested["style"])
    door.check_paths({"--output": requested["output"]})
    wanted = instruments(requested, metrics, own)
    model = ModelOptions.among(requested).open(requested["device"], requested["dtype"], requested["graphs"])
    from fastory.evaluation.compare import Comparison

    flags = {name: value for name, value in settings.items() if value is not None}
    comparison = Comparison(model, stories, methods, flags, requested["output"])
    return comparison, measures(replace(wanted, device=str(model.placement.device)), requested)


def read(paths: list[Path]) -> list[Story]:
    """Stories of files, folders and bundled names."""
    from fastory.builtin import EXAMPLES
    from fastory.files import check_names_fit
    from fastory.story import read_stories

    check_names_fit(paths)
    named = [EXAMPLES[str(path)] if str(path) in EXAMPLES and not path.exists() else path for path in paths]
    return [story for path in named for story in read_stories(path)]


def draw(comparison: Comparison, batch_size: int | None, quiet: bool) -> None:
    """What is missing, with a bar over stories and methods; outside a terminal a line for each."""
    from fastory import events

    total = len(comparison.cells)
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs,"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, disable=quiet or not stderr.is_terminal) as bar:
        task, done, noted = bar.add_task("", total=total), 0, set[str]()
        for cell, event in comparison.draw(batch_size):
            title = f"{cell.method.name}: {cell.resolved.story.title}"
            match event:
                case events.StoryStarted():
                    bar.update(task, description=plain(title))
                case events.Notice() if not quiet and event.message not in noted:
                    noted.add(event.message)
                    bar.console.print(
                        f"  [yellow]note:[/] {plain(f'{title}: {event.message}')}", soft_wrap=True
                    )
                case events.StoryFinished():
                    done += 1
                    bar.update(task, completed=done)
                    if not quiet and not stderr.is_terminal:
                        bar.console.print(f"  {plain(title)} ({done} of {total})", soft_wrap=True)


def write(comparison: Comparison, rows: list[Measured]) -> list[Path]:
    """Tables and page; the page last."""
    from fastory.evaluation.page import ShownStory, page
    from fastory.evaluation.tables import as_json, as_latex, as_markdown

    about = dict(said(comparison))
    shown = []
    for n, story in enumerate(comparison.stories):
        cells = comparison.cells[n :: len(comparison.stories)]
        pictures = {
            cell.method.name: cell.drawn(cell.resolved.settings.rounds - 1).pictures for cell in cells
        }
        shown.append(ShownStory(story.title, tuple(frame.caption for frame in story.frames), pictures))
    methods = {cell.method.name: cell.resolved.settings.identity() for cell in comparison.cells}
    texts = {
        "table.json": as_json(rows, about=about, models=comparison.model.hashes, methods=methods),
        "table.md": as_markdown(rows),
        "table.tex": as_latex(rows),
        "page.html": page(rows, shown, about),
    }
    return [comparison.write(name, text) for name, text in texts.items()]


def said(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """What the page has at its foot."""
    from fastory.wording import counted

    placement = comparison.model.placement
    frames = sum(len(story.frames) for story in comparison.stories)
    yield "Model", Path(comparison.model.name).name
    yield "Stories", f"{counted(len(comparison.stories), 'story')}, {counted(frames, 'frame')}"
    yield "Computed on", f"{placement.device}, {placement.dtype_name}, {counted(placement.threads, 'thread')}"
