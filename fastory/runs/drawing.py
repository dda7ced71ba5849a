"""Groups of runs are drawn: the modes' events passed on, pictures and halvings written first, then what is to be looked at."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence

from fastory.errors import FastoryError
from fastory.events import (
    BatchChosen,
    Event,
    FrameDrawn,
    Notice,
    RoundFinished,
    StoryFinished,
    StoryStarted,
)
from fastory.models.protocol import NOT_FINITE
from fastory.modes.executor import Executor, Worker
from fastory.modes.finished import Nothing
from fastory.modes.mode import StoryPlan
from fastory.runs.notices import story_notices
from fastory.runs.provenance import footer
from fastory.runs.recording import Recorder
from fastory.runs.redraw import end_redraw
from fastory.runs.story_run import StoryRun
from fastory.runtime import under_threads

PAUSE = 0.002  # seconds, while all that is drawn is drawn elsewhere


def draw_groups(
    groups: Sequence[Sequence[StoryRun]], executor: Executor, workers: Sequence[Worker]
) -> Iterator[Event]:
    """Each worker draws one group after the other, and this process writes what they draw."""
    waiting = deque(groups)
    drawing: dict[Worker, Generator[Event | None, None, None]] = {}
    try:
        while waiting or drawing:
            for worker in workers:
                if waiting and worker not in drawing:
                    group = waiting.popleft()
                    drawing[worker] = under_threads(group[0].threads, draw_group(group, executor, worker))
            heard = False
            for worker, events in list(drawing.items()):
                try:
                    event = next(events)
                except StopIteration:
                    del drawing[worker]
                    continue
                if event is not None:
                    heard = True
                    yield event
            if not heard and drawing:
                time.sleep(PAUSE)
    finally:
        for events in drawing.values():
            events.close()


def draw_group(
    group: Sequence[StoryRun], executor: Executor, worker: Worker
) -> Generator[Event | None, None, None]:
    """What is missing of these stories is drawn, then final pictures, sheets and storybooks are written.

    worker: draws them. None is passed on where it has nothing to say yet.
    """
    started: dict[int, float] = {}
    missing: list[StoryRun] = []
    for run in group:
        started[run.index] = time.monotonic()
        rounds, count = run.settings.rounds, len(run.story.frames)
        path = run.folder.path if run.folder else None
        counts = run.folder.counts(rounds, count) if run.folder else [0] * rounds
        done, steps = sum(counts), run.settings.steps
        left = sum((count - there) * run.settings.steps_of(k) for k, there in enumerate(counts))
        yield StoryStarted(run.story.title, count, rounds, steps, done, rounds * count, path, run.index, left)
        for notice in [*run.notices, *story_notices(run.model, run.story, run.settings, run.prompts)]:
            yield Notice(notice)
        if done < rounds * count:
            missing.append(run)
    lost = LostRounds(group)
    for run in missing:
        lost.refuse(run, lost.newest_round(run))
    if missing:
        for run in missing:
            if run.folder is not None:
                run.folder.record_processes(executor.processes)
        yield BatchChosen(group[0].sizes[-1], group[0].reason)
        yield from lost.watch(Recorder(group).watch(_mode_events(group, executor, worker)))
    black = [run for run in group if lost.is_lost(run, run.settings.rounds - 1)]
    for run in group:
        if run not in black:
            yield _finish(run, started[run.index])
    for run in black:
        lost.refuse(run, run.settings.rounds - 1)


class LostRounds:
    """Finds rounds in which no picture is finite: they make a story of black pictures, and nothing is drawn from them."""

    def __init__(self, group: Sequence[StoryRun]) -> None:
        """group: runs that are drawn together."""
        self._runs = {run.index: run for run in group}
        self._reasons: dict[tuple[int, int, int], str | None] = {}  # of the pictures drawn now

    def watch(self, events: Iterator[Event | None]) -> Iterator[Event | None]:
        """Pass events on; FastoryError after a round that is lost."""
        for event in events:
            yield event
            if isinstance(event, FrameDrawn):
                self._reasons[event.story_index, event.round, event.frame] = event.left_out
            elif isinstance(event, RoundFinished):  # of a mode with rounds, which draws a story alone
                (run,) = self._runs.values()
                self.refuse(run, event.round)

    def newest_round(self, run: StoryRun) -> int:
        """The last round that the run folder has whole, or -1."""
        folder, frames = run.folder, range(len(run.story.frames))
        rounds = reversed(range(run.settings.rounds))
        return next((k for k in rounds if folder and all(folder.has(k, i) for i in frames)), -1)

    def is_lost(self, run: StoryRun, round: int) -> bool:
        """Whether no picture of a finished round is finite."""
        frames = range(len(run.story.frames))
        return round >= 0 and all(self._reason(run, round, i) == NOT_FINITE for i in frames)

    def _reason(self, run: StoryRun, round: int, frame: int) -> str | None:
        key = (run.index, round, frame)
        if key in self._reasons or run.folder is None:
            return self._reasons.get(key)
        return run.folder.load(round, frame)[1]

    def refuse(self, run: StoryRun, round: int) -> None:
        """FastoryError that says what helps, where is_lost."""
        if not self.is_lost(run, round):
            return
        dtype = run.model.placement.dtype_name
        wider = f" or {dtype} is too narrow for them (--dtype float32)" if dtype != "float32" else ""
        kept = (
            f"; what was drawn is kept in {run.folder.path}, draw it anew with --overwrite"
            if run.folder
            else ""
        )
        raise FastoryError(
            f"{run.story.title!r}: no picture of round {round} has finite values. The weights of the model, an adapter or "
            f"a LoRA are damaged{wider}{kept}"
        )


def _mode_events(group: Sequence[StoryRun], executor: Executor, worker: Worker) -> Iterator[Event | None]:
    """The mode's events. All stories of a group take part, finished ones too: they keep the others' rows."""
    first = group[0]
    settings, plans = first.settings, [_plan(run, executor) for run in group]
    size = (settings.width or 0, settings.height or 0)
    return worker.stories(settings.mode, first.model, plans, batch_sizes=first.sizes, size=size)


def _plan(run: StoryRun, executor: Executor) -> StoryPlan:
    """A story as a mode draws it."""
    folder = run.folder
    finished, seeds = (Nothing(), {}) if folder is None else (folder, folder.seeds())
    return StoryPlan(run.story, run.settings, run.index, finished, seeds, run.prompts, executor)


def _finish(run: StoryRun, started: float) -> StoryFinished:
    """Move a redraw in, write what is to be looked at, and say where it is. started: by the monotonic clock, seconds."""
    story, folder = run.story, run.folder
    if folder is None:
        return StoryFinished(story.title, None, None, None, time.monotonic() - started)
    if folder.manifest.get("redraw"):
        end_redraw(folder, story)
    if not folder.complete():
        folder.finish(story, run.settings.rounds, footer(run.model, run.settings))
    path, seconds = folder.path, time.monotonic() - started
    return StoryFinished(story.title, path, path / "sheet.png", path / "storybook.html", seconds)
