"""Plots of a comparison as SVG that stands in a page: curves over rounds, what is traded for agreement, and what it costs.

matplotlib draws them: the extra `plots`. Without it there are none, and the table has every figure.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastory.evaluation.rows import Measured
from fastory.evaluation.tables import METRICS, Table
from fastory.packages import installed

WANTED = "plots want matplotlib: pip install 'fastory[plots]'"
SIZE = (3.8, 2.4)  # inches of 72 points
COSTS = ("unet_calls", "seconds", "peak_memory")  # they grow with the rounds by their nature
AGREEMENT = ("judge_agreement", "accs", "clip_i_self")  # the first that was measured stands for consistency
COLOURS = 8
# Colours that no plot has by itself, each in place of a variable of the page's style sheet, which knows light and dark.
STAND_INS = {"#010101": "var(--faint)", "#020202": "var(--line)"} | {
    f"#0300{n:02x}": f"var(--c{n})" for n in range(COLOURS)
}
FAINT, GRID, *METHODS = STAND_INS


@dataclass(frozen=True)
class Plot:
    """title: of the figure. better: in words, empty where neither is. svg: markup without a style sheet or script."""

    title: str
    better: str
    svg: str


@dataclass(frozen=True)
class Series:
    """One method by one metric. rounds: of its rows, in order; flat: of a mode without rounds, one row."""

    name: str
    colour: str
    rows: tuple[Measured, ...]

    @property
    def flat(self) -> bool:
        """Whether it has no rounds."""
        return self.rows[0].round is None


def available() -> bool:
    """Whether matplotlib is installed."""
    return installed("matplotlib") is not None


def plots(rows: Sequence[Measured]) -> list[Plot]:
    """Curves of each metric that a method has in two rounds or more; CLIP-T and UNet calls against agreement."""
    table = Table.of(rows)
    found = [
        _over_rounds(table, name) for name in table.metrics if name not in COSTS and _has_rounds(table, name)
    ]
    against = next((name for name in AGREEMENT if name in table.metrics), None)
    if against and len(table.lines) > 1:
        found += [
            _against(table, name, against) for name in ("clip_t", "unet_calls") if name in table.metrics
        ]
    return found


def methods_of(table: Table) -> list[str]:
    """The names of the lines, once each."""
    return list(dict.fromkeys(str(method) for method, _ in table.lines))


def _series(table: Table, metric: str) -> list[Series]:
    found = []
    for n, name in enumerate(methods_of(table)):
        cells = (table.cells.get((line, metric)) for line in table.lines if str(line[0]) == name)
        rows = tuple(row for row in cells if row is not None and row.value is not None)
        if rows:
            found.append(Series(name, METHODS[n % COLOURS], rows))
    return found


def _has_rounds(table: Table, metric: str) -> bool:
    return any(len(series.rows) > 1 for series in _series(table, metric))


def _over_rounds(table: Table, metric: str) -> Plot:
    """A line a method with its 95 % interval, rounds at their true distances; dashed for a method without rounds."""
    figure, axes = _figure()
    rounds = sorted({round for _, round in table.lines if round is not None})
    for series in _series(table, metric):
        values = [row.value for row in series.rows]
        if series.flat:
            axes.plot([rounds[0], rounds[-1]], values * 2, color=series.colour, linestyle="--", linewidth=1.5)
            continue
        at = [row.round for row in series.rows]
        axes.plot(at, values, color=series.colour, marker="o", markersize=4, linewidth=2)
        low, high = ([getattr(row, end) for row in series.rows] for end in ("low", "high"))
        if None not in low:
            axes.fill_between(at, low, high, color=series.colour, alpha=0.1, linewidth=0)
    axes.set_xticks(rounds)
    axes.set_xlabel("round", color=FAINT)
    return Plot(METRICS[metric].title, _better(metric), _inline(figure, metric))


def _against(table: Table, across: str, up: str) -> Plot:
    """Points of all lines, those of one method's rounds joined, of the first such method with their numbers."""
    figure, axes = _figure()
    ups = {(row.method, row.round): row for series in _series(table, up) for row in series.rows}
    numbered = ""
    for series in _series(table, across):
        both = [(row, ups[row.method, row.round]) for row in series.rows if (row.method, row.round) in ups]
        if not both:
            continue
        xs, ys = ([row.value for row in column] for column in zip(*both, strict=True))
        axes.plot(
            xs, ys, color=series.colour, marker="s" if series.flat else "o", markersize=4, linewidth=1.5
        )
        if not series.flat and numbered in ("", series.name):
            numbered = series.name
            for x, y, (row, _) in zip(xs, ys, both, strict=True):
                axes.annotate(str(row.round), (x, y), (4, -10), textcoords="offset points", color=FAINT)
    axes.set_xlabel(METRICS[across].title, color=FAINT)
    axes.set_ylabel(METRICS[up].title, color=FAINT)
    return Plot(f"{METRICS[up].title} and {METRICS[across].title}", "", _inline(figure, f"{across}-{up}"))


def _better(metric: str) -> str:
    return {1: "more is better", -1: "less is better", 0: ""}[METRICS[metric].better]


def _figure() -> tuple[Any, Any]:
    """A figure of its own, not of pyplot, which keeps what it draws."""
    from matplotlib.figure import Figure

    figure = Figure(SIZE, dpi=72, layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(color=GRID, labelcolor=FAINT, length=0, which="both")
    return figure, axes


def _inline(figure: Any, name: str) -> str:
    """SVG for a page whose policy admits no style attribute: these become attributes of their own, and ids the plot's own.

    The same rows give the same text: no date, and ids from a fixed salt.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastory"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", text, count=5)
    text = re.sub(r'style="([^"]*)"', lambda found: _attributes(found[1]), text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return re.sub("|".join(STAND_INS), lambda found: STAND_INS[found[0]], text)


def _attributes(style: str) -> str:
    """`fill: none; stroke-width: 2` as presentation attributes; the page's style sheet has the font."""
    pairs = (part.split(":", 1) for part in style.split(";") if ":" in part)
    return " ".join(f'{key.strip()}="{value.strip()}"' for key, value in pairs if key.strip() != "font")
