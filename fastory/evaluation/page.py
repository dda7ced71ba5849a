"""The page of a comparison: one HTML file that needs no other, with the table, plots, and the pictures.

It depends on pictures, captions and figures alone. Of many stories as many are shown as fit into MAX_BYTES.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastory.evaluation.plots import COLOURS, WANTED, available, methods_of, plots
from fastory.evaluation.rows import Measured
from fastory.evaluation.tables import METRICS, Table, line_title, shown_value, sources
from fastory.runs.storybook import Embedded, embedded, page_template

MAX_BYTES = 30_000_000  # of embedded pictures
SIDE = 256  # px, the longer side of an embedded picture
SHARE = 24_000  # bytes of one at most
MOST_FRAMES = 24  # of a story; more are shown at even distances


@dataclass(frozen=True)
class ShownStory:
    """A story as the page shows it. pictures: by method, one path a frame, of the last round."""

    title: str
    captions: tuple[str, ...]
    pictures: Mapping[str, tuple[Path, ...]]


def page(rows: Sequence[Measured], stories: Sequence[ShownStory], said: Mapping[str, str]) -> str:
    """The page's HTML. said: what is printed at its foot, by name. All stories have the same methods."""
    table = Table.of(rows)
    methods = list(stories[0].pictures)
    pictures = [min(len(story.captions), MOST_FRAMES) * len(methods) for story in stories]
    shown, there = _that_fit(pictures), available()
    return page_template("fastory.evaluation", "compare").render(
        methods=methods,
        table=_lines(table),
        heads=table.heads(),
        notes=[*table.notes(), *sources(rows), *([] if there else [WANTED])],
        plots=plots(rows) if there else [],
        legend=[(n % COLOURS, name) for n, name in enumerate(methods_of(table))],
        stories=[_story(stories[i]) for i in shown],
        count=len(stories),
        said=said,
    )


def _that_fit(pictures: Sequence[int]) -> list[int]:
    """The first stories whose pictures fit, at least one."""
    shown, total = [0], pictures[0]
    for i, count in enumerate(pictures[1:], start=1):
        total += count
        if total * SHARE * 4 // 3 > MAX_BYTES:
            break
        shown.append(i)
    return shown


def _lines(table: Table) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Each line's title, and its figures: the text, the interval, whether it is the best of its column."""
    best = {name: _best(table, name) for name in table.metrics}
    lines = []
    for line in table.lines:
        cells = []
        for name in table.metrics:
            text = shown_value(row := table.cells.get((line, name)))
            whole = shown_value(row, interval=True)
            cells.append((text, whole.removeprefix(text).strip(), text != "-" and text == best[name]))
        lines.append((line_title(line), cells))
    return lines


def _best(table: Table, name: str) -> str | None:
    rows = [row for (_, metric), row in table.cells.items() if metric == name and row.value is not None]
    better = METRICS[name].better
    if not better or len(rows) < 2:
        return None
    return shown_value(max(rows, key=lambda row: better * (row.value or 0.0)))


def _story(story: ShownStory) -> dict[str, object]:
    count = len(story.captions)
    frames = [
        round(i * (count - 1) / max(1, min(count, MOST_FRAMES) - 1)) for i in range(min(count, MOST_FRAMES))
    ]
    methods: list[tuple[str, list[Embedded]]] = [
        (method, [embedded(paths[i], SIDE, SHARE) for i in frames])
        for method, paths in story.pictures.items()
    ]
    return {
        "title": story.title,
        "frames": [(i, story.captions[i]) for i in frames],
        "methods": methods,
        "count": count,
    }
