"""Curves over rounds as shapes that a template draws: one chart a metric, one line a method. No plotting library is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastory.evaluation.rows import Measured
from fastory.evaluation.tables import METRICS, Table, shown_value

WIDTH, HEIGHT = 380, 240  # of a chart, in units of its view box
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 30  # margins
STEPS = (1, 2, 2.5, 5, 10)
WITHOUT_CURVES = ("unet_calls", "seconds", "peak_memory")  # they grow with the rounds by their nature


@dataclass(frozen=True)
class Line:
    """A method. index: its colour's. points: x,y in units, as an SVG's polyline has them. flat: for a method without rounds.

    band: the 95 % interval as a polygon, empty for a flat one. dots: (x, y, what stands at it).
    """

    name: str
    index: int
    points: str
    flat: bool
    band: str
    dots: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Chart:
    """One metric. rounds, values: ticks, each its position and its text."""

    title: str
    better: str
    rounds: tuple[tuple[float, str], ...]
    values: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]


def charts(rows: Sequence[Measured]) -> list[Chart]:
    """A chart for each metric that a method has in two rounds or more."""
    table = Table.of(rows)
    methods = list(dict.fromkeys(method for method, _ in table.lines))
    rounds = sorted({round for _, round in table.lines if round is not None})
    if len(rounds) < 2:
        return []
    found = []
    for name in table.metrics:
        series = {method: _series(table, name, method) for method in methods}
        if name not in WITHOUT_CURVES and any(len(points) > 1 for points in series.values()):
            found.append(_chart(name, series, rounds, {str(method): i for i, method in enumerate(methods)}))
    return found


def _series(table: Table, metric: str, method: str | None) -> list[Measured]:
    rows = (table.cells.get((line, metric)) for line in table.lines if line[0] == method)
    return [row for row in rows if row is not None and row.value is not None]


def _chart(
    metric: str, series: dict[str | None, list[Measured]], rounds: Sequence[int], colours: dict[str, int]
) -> Chart:
    values = [value for rows in series.values() for row in rows for value in (row.value, row.low, row.high)]
    scale = _Scale.of([value for value in values if value is not None], rounds)
    lines = tuple(
        _line(str(method), colours[str(method)], rows, scale) for method, rows in series.items() if rows
    )
    described = METRICS[metric]
    better = {1: "more is better", -1: "less is better", 0: ""}[described.better]
    return Chart(
        described.title,
        better,
        tuple((scale.x(k), str(k)) for k in rounds),
        tuple((scale.y(value), f"{value:g}") for value in scale.ticks),
        lines,
    )


def _line(method: str, colour: int, rows: Sequence[Measured], scale: _Scale) -> Line:
    flat = rows[0].round is None
    ends = (
        [(scale.first, rows[0]), (scale.last, rows[0])] if flat else [(row.round or 0, row) for row in rows]
    )
    points = [(scale.x(k), scale.y(row.value or 0.0)) for k, row in ends]
    said = [f"{method}, round {k}: {shown_value(row, interval=True)}" for k, row in ends]
    if flat:
        said = [f"{method}: {shown_value(rows[0], interval=True)}"] * 2
    upper = [(scale.x(k), scale.y(row.high)) for k, row in ends if row.high is not None]
    lower = [(scale.x(k), scale.y(row.low)) for k, row in ends if row.low is not None]
    dots = tuple((x, y, text) for (x, y), text in zip(points, said, strict=True))
    return Line(method, colour, _joined(points), flat, "" if flat else _joined([*upper, *lower[::-1]]), dots)


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


@dataclass(frozen=True)
class _Scale:
    """From rounds and values to units of the view box. Rounds lie at their true distances."""

    first: int
    last: int
    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], rounds: Sequence[int]) -> _Scale:
        """Four to six round numbers span the values."""
        low, high = min(values), max(values)
        span = (high - low) or abs(high) or 1.0
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(power * step for step in STEPS if span / (power * step) <= 5)
        first, last = math.floor(low / step), math.ceil(high / step)
        if first == last:  # values that are all the same lie in the middle
            first, last = first - 1, last + 1
        ticks = tuple(round(step * n, 10) for n in range(first, last + 1))
        return cls(rounds[0], rounds[-1], ticks[0], ticks[-1], ticks)

    def x(self, round_: int) -> float:
        share = (round_ - self.first) / (self.last - self.first)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)
