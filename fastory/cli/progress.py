"""What is printed while a command works: events as JSON lines, or bars and notes for people."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastory.cli.reporting import plain, say, stderr
from fastory.wording import counted

if TYPE_CHECKING:
    from fastory.events import Event, FrameDrawn, StepDone, StoryStarted


def show_json(events: Iterable[Any]) -> None:
    """Each event as a line of JSON."""
    from fastory.events import as_json

    for event in events:
        say(as_json(event))


def show_drawing(events: Iterable[Event], quiet: bool) -> None:
    """Progress and notes; the run folders on stdout."""
    with Screen(quiet) as screen:
        for event in events:
            screen.show(event)


BETWEEN_LINES = 10.0  # seconds, of a tuning's progress where there is no bar


def show_tuning(events: Iterable[Any], quiet: bool) -> None:
    """A bar over the steps of a tuning and its losses, outside a terminal a line now and then; the adapter on stdout."""
    from fastory.tuning import loop

    lines = not quiet and not stderr.is_terminal
    printed = float("-inf")  # when the last line was printed

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    hidden = quiet or lines
    with Progress(*columns, console=stderr, disable=hidden, speed_estimate_period=120) as bar:
        task = bar.add_task("", total=None)
        for event in events:
            match event:
                case loop.Encoded():
                    bar.update(task, description="encoding frames", completed=event.done, total=event.frames)
                    if lines and (event.done == event.frames or time.monotonic() - printed >= BETWEEN_LINES):
                        printed = time.monotonic()
                        bar.console.print(f"  frames encoded: {event.done} of {event.frames}", soft_wrap=True)
                case loop.Stepped():
                    said = None if event.loss is None else f"loss {event.loss:.4f}"
                    bar.update(task, completed=event.step, total=event.steps, description=said)
                    due = event.step == event.steps or time.monotonic() - printed >= BETWEEN_LINES
                    if lines and said and due:
                        printed = time.monotonic()
                        bar.console.print(f"  step {event.step} of {event.steps}: {said}", soft_wrap=True)
                case loop.Validated():
                    said = "pictures drawn" if event.loss is None else f"validation loss {event.loss:.4f}"
                    if not quiet:
                        bar.console.print(f"  step {event.step}: {said}", soft_wrap=True)
                case loop.Tuned():
                    bar.update(task, visible=False)
                    say(str(event.adapter))


class Screen:
    """Progress for people: notes on stderr, a bar over the story's denoising steps, the run folder on stdout."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeRemainingColumn(),  # from the measured step times
            TextColumn("left"),
            console=stderr,
            disable=quiet or not stderr.is_terminal,
            speed_estimate_period=120,
        )
        self.task = self.progress.add_task("", visible=False)
        self.round, self.frame, self.done_in_round, self.steps_of_round = "", -1, 0, 0
        self.titles: dict[int, str] = {}  # stories that are being drawn, by their place in the call
        self.total = 0
        self.since = time.monotonic()
        self.drawn: dict[int, tuple[int, int]] = {}  # causal: finished frames and all, by the story's place

    def __enter__(self) -> Screen:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def note(self, text: str) -> None:
        """One line above the bar."""
        if not self.quiet:
            self.progress.console.print(f"  {text}", soft_wrap=True)

    def count(self, drawn: FrameDrawn) -> None:
        """Causal mode where there is no bar: a line for each frame. Iterative mode has one for each round."""
        if self.round or stderr.is_terminal:
            return
        done, total = self.drawn[drawn.story_index]
        self.drawn[drawn.story_index] = (done + 1, total)
        title = f"{plain(self.titles[drawn.story_index])}: " if len(self.titles) > 1 else ""
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        self.note(f"{title}frame {drawn.frame} drawn ({done + 1} of {total}): {seconds:.1f} s")

    def begin(self, event: StoryStarted) -> None:
        """A story begins: what it is, and its steps in the bar."""
        state = f"; {event.finished} of {counted(event.total, 'picture')} finished" if event.finished else ""
        rounds = f", {counted(event.rounds - 1, 'round')}" if event.rounds > 1 else ""
        self.note(f"[bold]{plain(event.story)}[/]: {counted(event.frames, 'frame')}{rounds}{state}")
        self.drawn[event.story_index] = (event.finished, event.total)
        self.total += event.steps_left
        if self.titles:  # drawn side by side with others
            self.progress.update(self.task, total=self.total, visible=self.total > 0)
        else:
            self.progress.reset(self.task, total=self.total, visible=self.total > 0)
        self.titles[event.story_index] = event.story

    def step(self, event: StepDone) -> None:
        """A denoising step of some frames, in the bar."""
        first, last = event.frames[0], event.frames[-1]
        which = f"frame {first}" if first == last else f"frames {first}-{last}"
        if not self.round and first != self.frame:  # causal: what memory may cost is one frame
            self.frame, self.done_in_round = first, 0
        title = self.titles[event.story_index] if len(self.titles) > 1 else ""
        which += f", draft {event.draft}" if event.draft else ""
        parts = [title, self.round, which, f"step {event.step} of {event.steps}"]
        described = plain(", ".join(part for part in parts if part))
        done = 0 if event.draft else len(event.frames)
        self.done_in_round += done
        self.progress.update(self.task, advance=done, description=described)

    def stay(self, event: FrameDrawn) -> None:
        """A frame that no longer changes: its steps are saved, and it is said once."""
        self.done_in_round += self.steps_of_round
        self.progress.update(self.task, advance=self.steps_of_round)
        if event.converged == event.round - 1:
            self.note(f"frame {event.frame} no longer changes: finished in round {event.converged}")

    def show(self, event: Event) -> None:
        """One event."""
        from fastory import events

        match event:
            case events.StoryStarted():
                self.begin(event)
            case events.BatchChosen():
                self.note(plain(event.reason))
            case events.Notice():
                self.note(f"[yellow]note:[/] {plain(event.message)}")
            case events.Compiling():
                self.note(f"compiling {event.done} of {event.total}")
            case events.RoundStarted():
                self.round, self.done_in_round = f"round {event.round} of {event.rounds}", 0
                self.steps_of_round = event.steps
            case events.StepDone():
                self.step(event)
            case events.FrameDrawn() if event.left_out:
                which = (
                    f"frame {event.frame} of round {event.round}" if self.round else f"frame {event.frame}"
                )
                self.note(f"[yellow]note:[/] {which} {event.left_out}; it is left out as a reference")
                self.count(event)
            case events.FrameDrawn() if event.converged is not None:
                self.stay(event)
            case events.FrameDrawn():
                self.count(event)
            case events.BatchHalved():
                self.progress.update(self.task, advance=-self.done_in_round)
                what = f"round {event.round}" if event.frame is None else f"frame {event.frame}"
                again = f"{what} again, {event.size} at once"
                self.note(f"[yellow]out of memory[/] ({plain(event.needed)}); {again}")
            case events.RoundFinished():
                self.note(f"round {event.round} of {event.rounds}: {event.seconds:.1f} s")
            case events.StoryFinished():
                self.titles, self.total, self.round = {}, 0, ""
                self.note(f"sheet      {plain(event.sheet)}")
                self.note(f"storybook  {plain(event.storybook)}")
                self.progress.update(self.task, visible=False)
                self.progress.refresh()
                say(str(event.folder))


def show_batch(events: Iterable[Any], quiet: bool) -> None:
    """A line for each story and for what becomes of workers, a bar over the stories; the batch's folder on stdout."""
    from fastory.batch import messages

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("stories {task.fields[left]}"),
    )
    with Progress(*columns, console=stderr, disable=quiet or not stderr.is_terminal) as bar:
        task = bar.add_task("", total=None, left="")

        def note(text: str) -> None:
            if not quiet:
                bar.console.print(f"  {text}", soft_wrap=True)

        for event in events:
            match event:
                case messages.BatchStarted():
                    bar.update(task, total=event.stories, completed=event.done)
                    finished = f", {event.done} of them finished" if event.done else ""
                    drawing = f"; {counted(event.workers, 'worker')}" if event.workers else ""
                    note(f"{counted(event.stories, 'story')}{finished}{drawing}")
                case messages.WorkerReady():
                    note(f"{plain(event.worker)}: {plain(event.device)}")
                case messages.WorkerLost():
                    story = f"; {plain(event.story)} waits again" if event.story else ""
                    note(f"[yellow]note:[/] {plain(event.worker)} {plain(event.reason)}{story}")
                case messages.BatchNotice():
                    story = f"{plain(event.story)}: " if event.story else ""
                    note(f"[yellow]note:[/] {story}{plain(event.message)}")
                case messages.BatchProgress():
                    said = f"{plain(event.story)}: {event.finished} of {event.total}"
                    bar.update(task, description=said, left=_time_left(event.seconds_left))
                case messages.StoryDone():
                    bar.update(task, completed=event.done + event.failed)
                    note(
                        f"{plain(event.story)}: {event.seconds:.1f} s ({event.done} done, {event.failed} failed, {event.left} "
                        f"left{_time_left(event.seconds_left)})"
                    )
                case messages.StoryFailed():
                    bar.update(task, completed=event.done + event.failed)
                    note(f"[bold red]failed:[/] {plain(event.story)}: {plain(event.reason)}")
                case messages.BatchFinished():
                    bar.update(task, visible=False)
                    say(str(event.folder))


def _time_left(seconds: float | None) -> str:
    """As it stands behind the number of stories."""
    return "" if seconds is None else f", about {timedelta(seconds=round(seconds))}"


def show_export(events: Iterable[Any], quiet: bool) -> None:
    """A line for each component and each engine; the folder on stdout."""
    from fastory.export import onnx, tensorrt

    def note(text: str) -> None:
        if not quiet:
            stderr.print(f"  {text}", soft_wrap=True)

    folder = Path()
    for event in events:
        match event:
            case onnx.Exported():
                note(f"{event.component}: {event.bytes / 1e6:.1f} MB of weights, {event.seconds:.0f} s")
            case onnx.Compared(worst=None):
                note("bfloat16: graphs checked; compared with torch as float32, which a CPU runtime computes")
            case onnx.Compared(comparisons=count, worst=onnx.Parity() as worst):
                note(
                    f"{count} comparisons with torch agree; nearest to what is allowed: {worst.component}, "
                    f"{worst.error:.2g} from float64 of {worst.allowed:.2g}"
                )
            case onnx.Rebound():
                note(f"bound for {event.binding}; the weights are as they were")
            case onnx.Finished():
                folder = event.folder
            case tensorrt.Built():
                note(f"{event.engine.name}: {event.bytes / 1e6:.0f} MB, {event.seconds:.0f} s")
    say(str(folder))
