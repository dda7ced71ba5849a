"""Methods compared on the same stories: drawn into run folders of one folder, measured, and written as tables and a page.

DIR/
  compare.json                  that the folder is ours; written first
  runs/METHOD/STORY-HASH/       run folders, which are resumed, or kept where they are finished
  costs/METHOD/STORY-HASH.json  the UNet calls and the memory of each
  measured.jsonl                what was measured, so that an interrupted comparison goes on
  table.json  table.md  table.tex  page.html

A run folder's name holds the hash of story and settings: a comparison with other settings draws beside the old one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastory import files
from fastory.documents import read_json
from fastory.errors import InputError
from fastory.evaluation.costs import Cost, seconds_of
from fastory.evaluation.journal import Journal
from fastory.evaluation.measures import Measure, SetMeasure, measure
from fastory.evaluation.methods import Method
from fastory.evaluation.rows import Measured, Source, means
from fastory.evaluation.stories import DrawnStory, drawn_story
from fastory.events import Event
from fastory.models.protocol import Model
from fastory.runs.generate import generate
from fastory.runs.manifest import picture_name
from fastory.runs.resolve import ResolvedStory, resolve_story
from fastory.story import Story

SCHEMA = 1
MARK, JOURNAL = "compare.json", "measured.jsonl"
PRODUCTS = ("table.json", "table.md", "table.tex", "page.html")
TODO = "choose another --output"
MEMORY = {"process": "the whole process, weights and libraries in it"}


@dataclass(frozen=True)
class Cell:
    """One story by one method. folder: its run folder."""

    method: Method
    resolved: ResolvedStory
    folder: Path
    cost: Path

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds that are measured."""
        return self.method.rounds or (self.resolved.settings.rounds - 1,)

    @property
    def initial_rounds(self) -> tuple[int, ...]:
        """The rounds whose pictures were given: the first one of several, in place of which initial pictures stand."""
        several = self.resolved.settings.rounds > 1
        return (0,) if several and self.resolved.story.initial_pictures else ()

    def drawn(self, round: int) -> DrawnStory:
        """The story with the pictures of a round."""
        story = self.resolved.story
        pictures = [self.folder / picture_name(round, i) for i in range(len(story.frames))]
        return drawn_story(story, self.folder, pictures)


class Comparison:
    """A folder of comparisons, locked, and the cells of this one. Use as a context manager."""

    def __init__(
        self,
        model: Model,
        stories: Sequence[Story],
        methods: Sequence[Method],
        values: Mapping[str, Any],
        output: Path,
    ) -> None:
        """values: settings of all methods, under the methods' own. Raises InputError for a story that a method cannot draw.

        Nothing is written before all of them are checked.
        """
        self.model, self.stories, self.methods, self.values, self.output = (
            model,
            stories,
            methods,
            values,
            output,
        )
        check_output(output)
        self.cells = [self._cell(method, story) for method in methods for story in stories]
        folders = [cell.folder for cell in self.cells]
        if len(set(folders)) < len(folders):
            twice = next(cell for cell in self.cells if folders.count(cell.folder) > 1)
            raise InputError(f"{twice.resolved.story.title!r} was given twice; wanted every story once")

    def __enter__(self) -> Comparison:
        files.folder_for(self.output, TODO)
        self._lock = files.lock_folder(self.output, "compares in", TODO)
        if not (self.output / MARK).exists():
            said = {"schema": SCHEMA, "what": "fastory compare", "written": [JOURNAL, *PRODUCTS]}
            files.atomic_write(self.output / MARK, json.dumps(said, indent=1).encode())
        self.journal = Journal(self.output / JOURNAL)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _cell(self, method: Method, story: Story) -> Cell:
        values = self._values(method)
        if method.initial:
            story = replace(story, initial_pictures=method.initial)
        resolved = resolve_story(self.model, story, values, preset=method.preset)
        name = f"{story.slug}-{resolved.identity.digest()[:8]}"
        costs = self.output / "costs" / method.folder / f"{name}.json"
        return Cell(method, resolved, self.output / "runs" / method.folder / name, costs)

    def _values(self, method: Method) -> dict[str, Any]:
        named = {} if method.preset else {"mode": method.mode}
        return {**self.values, **named, **method.settings}

    def draw(self, batch_size: int | None = None) -> Iterator[tuple[Cell, Event]]:
        """Draws what is missing, cell after cell; every event with its cell."""
        for cell in self.cells:
            events = generate(
                cell.resolved.story,
                model=self.model,
                preset=cell.method.preset,
                under=cell.folder.parent,
                batch_size=batch_size,
                **self._values(cell.method),
            )
            for event in Cost.read(cell.cost).counted(events, self.model.placement.device):
                yield cell, event

    def measure(self, measures: Sequence[Measure], of_all: Sequence[SetMeasure] = ()) -> Iterator[Measured]:
        """Rows of every method and round: of frames, of stories, and means over stories, costs among them."""
        for method in self.methods:
            cells = [cell for cell in self.cells if cell.method is method]
            for round in sorted({round for cell in cells for round in cell.rounds}):
                drawn = [cell for cell in cells if round in cell.rounds]
                named: dict[str, Any] = {"method": method.name, "round": round if method.rounds else None}
                rows = measure([cell.drawn(round) for cell in drawn], measures, self.journal, of_all)
                yield from (replace(row, **named) for row in rows)
                costs = [row for cell in drawn for row in self._costs(cell, round)]
                yield from (replace(row, **named) for row in [*costs, *means(costs)])

    def _costs(self, cell: Cell, round: int) -> Iterator[Measured]:
        cost, frames = Cost.read(cell.cost), len(cell.resolved.story.frames)
        by = Source("fastory", None, self.model.placement.as_dict())
        common: dict[str, Any] = {
            "story": cell.resolved.story.title,
            "folder": str(cell.folder),
            "count": frames,
            "of": frames,
        }
        uncounted = "some of its pictures were not drawn by fastory compare"
        calls = cost.calls_a_frame(cell.folder, frames, round, cell.initial_rounds)
        yield Measured("unet_calls", calls, by, missing=None if calls is not None else uncounted, **common)
        yield Measured("seconds", seconds_of(cell.folder, round) / frames, by, **common)
        if round == max(cell.rounds):
            missing = None if cost.peak else "the peak of memory cannot be told here"
            note = {"of": MEMORY.get(cost.memory, cost.memory)}
            peak = float(cost.peak) if cost.peak else None
            yield Measured("peak_memory", peak, by, missing=missing, notes=note if peak else {}, **common)

    def write(self, name: str, text: str) -> Path:
        """One of PRODUCTS."""
        assert name in PRODUCTS
        files.atomic_write(self.output / name, text.encode())
        return self.output / name


def check_output(output: Path) -> None:
    """InputError for a folder that holds anything and is not ours, or is of a newer fastory."""
    files.check_names_fit([output])
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; wanted a new or empty folder for --output")
    mark = output / MARK
    if mark.exists():
        data = read_json(mark, what="the mark of a comparison's folder", todo=TODO)
        if not isinstance(data, dict) or data.get("what") != "fastory compare":
            raise InputError(f"{mark} is not ours; {TODO}")
        if data.get("schema", 0) > SCHEMA:
            raise InputError(
                f"{mark} has schema {data['schema']}; this version reads up to {SCHEMA}: use a newer fastory, or {TODO}"
            )
        return
    ours = (files.LOCK, files.partial_of(mark).name)
    strange = sorted(p.name for p in output.iterdir() if p.name not in ours) if output.is_dir() else []
    if strange:
        raise InputError(
            f"{output} is no folder of comparisons: it holds {strange[0]!r} and no {MARK} of ours; "
            "wanted a new or empty folder for --output"
        )
