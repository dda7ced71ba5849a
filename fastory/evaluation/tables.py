"""Rows as tables: JSON with every row, Markdown and LaTeX with the means over stories."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastory.errors import InputError
from fastory.evaluation.rows import SCHEMA, Measured
from fastory.wording import counted


@dataclass(frozen=True)
class Metric:
    """How a metric stands in tables. better: 1 where more is better, -1 where less is, 0 where neither. unit: what its value is
    divided by, for people."""

    title: str
    better: int
    decimals: int = 3
    unit: float = 1.0


METRICS: Mapping[str, Metric] = {
    "clip_t": Metric("CLIP-T", 1),
    "clip_i": Metric("CLIP-I (truth)", 1),
    "clip_i_self": Metric("CLIP-I (self)", 1),
    "dino": Metric("DINO", 1),
    "accs": Metric("aCCS", 1),
    "afid": Metric("aFID", -1, 3),
    "fid": Metric("FID", -1, 3),
    "kid": Metric("KID", -1, 4),
    "cids_self": Metric("CIDS self", 1),
    "cids_cross": Metric("CIDS cross", 1),
    "occm": Metric("OCCM", 1, 1),
    "copy_paste": Metric("copy-paste", 0),
    "judge_agreement": Metric("agreement", 1),
    "judge_colour": Metric("colour", 1),
    "judge_hat": Metric("hat", 1),
    "judge_scarf": Metric("scarf", 1),
    "judge_captions": Metric("captions", 1),
    "judge_distinct": Metric("distinct", 1),
    "unet_calls": Metric("UNet calls a frame", -1, 1),
    "seconds": Metric("seconds a frame", -1, 2),
    "peak_memory": Metric("peak memory, MiB", -1, 0, 2**20),
}
OF_PICTURES = ("fid", "kid")  # of all stories together
ARROWS = {1: " ↑", -1: " ↓", 0: ""}


@dataclass(frozen=True)
class Table:
    """Means over stories: a line for each method and round, a column for each metric."""

    lines: tuple[tuple[str | None, int | None], ...]
    metrics: tuple[str, ...]
    cells: Mapping[tuple[tuple[str | None, int | None], str], Measured]

    @classmethod
    def of(cls, rows: Sequence[Measured]) -> Table:
        """In the order of the rows, and of METRICS."""
        cells = {((row.method, row.round), row.metric): row for row in rows if row.kind == "mean"}
        there = {metric for (_, metric), row in cells.items() if row.value is not None}
        metrics = tuple(metric for metric in METRICS if metric in there)
        return cls(tuple(dict.fromkeys(line for line, _ in cells)), metrics, cells)

    def heads(self) -> list[str]:
        """Titles of the columns, with what is better."""
        return [METRICS[name].title + ARROWS[METRICS[name].better] for name in self.metrics]

    def texts(self, line: tuple[str | None, int | None]) -> list[str]:
        """A line's figures, each with its interval; a dash for none."""
        return [shown_value(self.cells.get((line, name)), interval=True) for name in self.metrics]

    def notes(self) -> list[str]:
        """What must be read beside the figures: counts, misses, what is missing and why; where all lines have it, once."""
        by_note: dict[tuple[str, str], list[str]] = {}
        for (line, name), row in self.cells.items():
            for note in _notes(row):
                by_note.setdefault((METRICS[name].title, note), []).append(line_title(line))
        whole = len(self.lines)
        said = {
            key: "" if len(where) == whole else f" ({'; '.join(where)})" for key, where in by_note.items()
        }
        return [f"{title}{where}: {note}" for (title, note), where in said.items()]


def _notes(row: Measured) -> Iterator[str]:
    """What must be read beside one figure."""
    if row.value is None:
        yield str(row.missing)
    if row.notes:
        shown = (f"{value:g}" if isinstance(value, float) else str(value) for value in row.notes.values())
        yield ", ".join(f"{key} {text}" for key, text in zip(row.notes, shown, strict=True))
    if row.value is not None and row.count < row.of:
        yield f"of {row.count} of {counted(row.of, 'picture' if row.metric in OF_PICTURES else 'story')}"


def line_title(line: tuple[str | None, int | None]) -> str:
    """A line's method and round."""
    method, round = line
    return f"{method or 'mean'}" + (f", round {round}" if round is not None else "")


def shown_value(row: Measured | None, interval: bool = False) -> str:
    """A figure for people, with its interval; a dash for none."""
    if row is None or row.value is None:
        return "-"
    metric = METRICS[row.metric]
    text = f"{row.value / metric.unit:.{metric.decimals}f}"
    if not interval or row.low is None or row.high is None or row.count < 2:
        return text
    return (
        f"{text} [{row.low / metric.unit:.{metric.decimals}f}, {row.high / metric.unit:.{metric.decimals}f}]"
    )


def as_json(rows: Sequence[Measured], **more: Any) -> str:
    """Every row, and what else is said of all of them."""
    return (
        json.dumps(
            {"schema": SCHEMA, **more, "rows": [row.as_data() for row in rows]}, ensure_ascii=False, indent=1
        )
        + "\n"
    )


def as_markdown(rows: Sequence[Measured], **_: Any) -> str:
    """The means, with 95 % intervals over stories."""
    table = Table.of(rows)
    lines = [["", *table.heads()], ["---"] * (len(table.metrics) + 1)]
    lines += [[line_title(line), *table.texts(line)] for line in table.lines]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    notes = "".join(f"\n- {note}" for note in [*sources(rows), *table.notes()])
    return f"{text}\n\nMeans over stories; in brackets 95 % bootstrap intervals over stories unless said.\n{notes}\n"


def as_latex(rows: Sequence[Measured], **_: Any) -> str:
    """The means as a tabular, for booktabs."""
    table = Table.of(rows)
    arrows = {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    heads = [
        escaped(head[:-1]) + arrows[head[-1]] if head[-1] in arrows else escaped(head)
        for head in table.heads()
    ]
    lines = [["", *heads]] + [
        [escaped(line_title(line)), *map(escaped, table.texts(line))] for line in table.lines
    ]
    head, *body = [" & ".join(line) + r" \\" for line in lines]
    comments = [f"% {note}" for note in [*sources(rows), *table.notes()]]
    columns = "l" + "r" * len(table.metrics)
    parts = [
        r"\begin{tabular}{" + columns + "}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*parts, *comments]) + "\n"


def sources(rows: Sequence[Measured]) -> list[str]:
    """What measured which metrics: model, sha256, versions and settings."""
    by: dict[str, list[str]] = {}
    for row in rows:
        if row.kind == "mean" and row.by.sha256:
            settings = "".join(f", {name} {value}" for name, value in row.by.settings.items())
            by.setdefault(f"{row.by.model} (sha256 {row.by.sha256[:16]}{settings})", []).append(
                METRICS[row.metric].title
            )
    said = [f"{', '.join(dict.fromkeys(names))}: {source}" for source, names in by.items()]
    versions = next((row.by.versions for row in rows), {})
    return [*said, ", ".join(f"{name} {version}" for name, version in versions.items())] if rows else said


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def escaped(text: str) -> str:
    """A text as LaTeX prints it."""
    return "".join(_LATEX.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


FORMS = {".json": as_json, ".md": as_markdown, ".tex": as_latex}


def check_form(path: Path) -> None:
    """InputError for a suffix that is no table's."""
    if path.suffix.lower() not in FORMS:
        raise InputError(f"--output {path}: wanted a name that ends in {', '.join(FORMS)}")
