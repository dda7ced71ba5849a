"""What is measured, as rows: one figure each, with what it was measured by; and means over stories with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

from fastory import __version__
from fastory.intervals import interval
from fastory.packages import installed

SCHEMA = 1
VERSIONED = ("torch", "transformers", "pillow", "numpy")
OPTIONAL = ("torchmetrics", "torch-fidelity", "scipy")


def versions() -> dict[str, str]:
    """Versions of fastory and of the libraries that decide a figure; of extras those that are installed."""
    found = {"fastory": __version__, **{name: version(name) for name in VERSIONED}}
    return found | {name: there for name in OPTIONAL if (there := installed(name))}


@dataclass(frozen=True)
class Source:
    """What a figure was measured by. model: a hub id, a folder or a name of ours; sha256: of its weights, None without any."""

    model: str
    sha256: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)


@dataclass(frozen=True)
class Measured:
    """One figure.

    metric: its name, as METRICS of tables.py has it. value: None where there is none; missing then says why. story, folder:
    None for a mean over stories, whose 95 % interval is low to high. frame: None for what is of the whole story. count: how
    many frames, pairs or stories the value is of, of how many. notes: what must be read beside it, such as misses. method,
    round: of a comparison.
    """

    metric: str
    value: float | None
    by: Source
    story: str | None = None
    folder: str | None = None
    frame: int | None = None
    caption: str | None = None
    count: int = 1
    of: int = 1
    missing: str | None = None
    low: float | None = None
    high: float | None = None
    notes: Mapping[str, int | float | str] = field(default_factory=dict)
    method: str | None = None
    round: int | None = None

    @property
    def kind(self) -> str:
        """`frame`, `story`, or `mean` over stories."""
        return "mean" if self.story is None else "story" if self.frame is None else "frame"

    def as_data(self) -> dict[str, Any]:
        """As a table's JSON holds it."""
        return {"kind": self.kind, **asdict(self)}


def from_data(data: Mapping[str, Any]) -> Measured:
    """The row that `as_data` wrote."""
    values = {name: value for name, value in data.items() if name != "kind"}
    return Measured(**{**values, "by": Source(**values["by"])})


def means(rows: Iterable[Measured]) -> Iterator[Measured]:
    """The mean over stories of each metric, every story counting once, with its interval; notes that count are summed."""
    by_metric: dict[str, list[Measured]] = {}
    for row in rows:
        if row.kind == "story":
            by_metric.setdefault(row.metric, []).append(row)
    for stories in by_metric.values():
        yield _mean(stories)


def _mean(stories: Sequence[Measured]) -> Measured:
    first, found = stories[0], [row.value for row in stories if row.value is not None]
    notes = _notes(stories)
    whole = replace(
        first,
        value=None,
        story=None,
        folder=None,
        caption=None,
        count=len(found),
        of=len(stories),
        notes=notes,
    )
    if not found:
        return whole  # with the first story's reason
    value, low, high = interval(found)
    return replace(whole, value=value, low=low, high=high, missing=None)


def _notes(stories: Sequence[Measured]) -> dict[str, int | float | str]:
    """Counts summed, and what is said of every story alike."""
    found: dict[str, int | float | str] = {}
    for name in dict.fromkeys(name for row in stories for name in row.notes):
        values = [row.notes[name] for row in stories if name in row.notes]
        if all(isinstance(value, int) for value in values):
            found[name] = sum(int(value) for value in values)
        elif len(set(values)) == 1:
            found[name] = values[0]
    return found
