"""From stories to pictures: the door. Settings resolved, run folders opened, stories drawn, events passed on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from fastory.errors import FastoryError, InputError
from fastory.events import Event, Notice
from fastory.models.protocol import Model
from fastory.models.torch_model import StoryModel
from fastory.modes.executor import HERE, Executor
from fastory.modes.mode import mode_of
from fastory.pictures import as_picture, as_pictures, open_picture
from fastory.runs.drawing import draw_groups
from fastory.runs.folder import RunFolder
from fastory.runs.identity import run_paths
from fastory.runs.progress import StepBar
from fastory.runs.resolve import Frames, ResolvedStory, resolve_story
from fastory.runs.story_run import StoryRun, begin_runs, drawn_together, open_folder
from fastory.settings import Settings, check
from fastory.story import Character, Story, are_captions

Opened = list[tuple[ResolvedStory, RunFolder | None]]


def generate(
    stories: Story | str | Path | Sequence[Story | str | Path],
    *,
    model: Model | str = "builtin",
    settings: Settings | None = None,
    preset: str | None = None,
    characters: Sequence[Character] = (),
    first_frame: str | Path | Image.Image | None = None,
    initial_pictures: str | Path | Image.Image | Sequence[str | Path | Image.Image] = (),
    output: str | Path | None = None,
    under: str | Path | None = None,
    overwrite: bool = False,
    frames: Sequence[int] | slice | None = None,
    redraw_seed: int | None = None,
    batch_size: int | None = None,
    callback: Callable[[Event], object] | None = None,
    progress: bool = False,
    executor: Executor = HERE,
    **values: Any,
) -> Iterator[Event]:
    """Draw one story or many; yields events, among them every picture as it is finished.

    stories: Story objects or story files; a list of texts of which none is a file, or has the suffix of one, is the captions
    of one story, as Story.from_captions takes them. model: an opened StoryModel, or what StoryModel.open takes.
    settings: all that decides the pictures, in place of what the story file and the model's folder say; `values` are single
    fields of Settings and come before it. Without it they come before the story file, the preset and the model's folder.
    characters: with pictures, as paths or PIL's, for every story. first_frame: causal, a path or a PIL picture: the frame 0 of
    all stories; those with the same settings are drawn side by side. initial_pictures: as of Story, for every story.
    output: the run folder (with several stories, the folder of their run folders); under: a folder in which run folders are
    named by story and settings. Without both, nothing is written. frames: only redraw these, in a finished run folder; in
    causal mode all from one on, as a slice(k, None).
    callback: called with every event before it is yielded. progress: a bar over the denoising steps, in a notebook too.
    executor: the processes that draw, by default this one; see fastory.distributed.

    Everything is checked before the first event: raises InputError for what cannot be used. While drawing, raises
    FastoryError for a full disk or for memory that does not suffice for one frame.
    """
    read = _read_stories(stories, characters, first_frame, initial_pictures)
    opened_model: Model = StoryModel.open(model) if isinstance(model, (str, Path)) else model
    somewhere = output is not None or under is not None
    _check_request(frames, redraw_seed, batch_size, overwrite=overwrite, somewhere=somewhere)
    _check_settings(settings, preset)
    how: dict[str, Any] = {"preset": preset, "whole": settings, "redrawn": frames, "batch_size": batch_size}
    resolved = [resolve_story(opened_model, story, values, **how) for story in read]
    stack = ExitStack()
    try:
        opened = _open_folders(resolved, output, under, overwrite, redraw_seed, stack)
    except BaseException:
        stack.close()
        raise
    listeners: list[Callable[[Event], object]] = [] if callback is None else [callback]
    if progress:
        listeners.append(stack.enter_context(StepBar()))
    events = _draw(opened, batch_size, stack, listeners, executor)
    next(events)  # a generator that was never begun would not release the folders when it is closed
    return events


def _read_stories(
    stories: Story | str | Path | Sequence[Story | str | Path],
    characters: Sequence[Character],
    first_frame: str | Path | Image.Image | None,
    initial_pictures: object,
) -> list[Story]:
    """The stories, files read and captions taken as one story; with these characters and this frame 0, if they are given."""
    listed = [stories] if isinstance(stories, (Story, str, Path)) else list(stories)
    if not listed:
        raise InputError("no story was given; wanted at least one story file")
    if not isinstance(stories, str) and are_captions(listed):
        listed = [Story.from_captions([str(text) for text in listed])]
    read = [story if isinstance(story, Story) else Story.read(story) for story in listed]
    read = [story.with_characters(characters) for story in read] if characters else read
    if pictures := as_pictures(initial_pictures):
        for picture in pictures:
            open_picture(picture)
        read = [replace(story, initial_pictures=pictures) for story in read]
    if first_frame is None:
        return read
    try:
        picture = as_picture(first_frame)
        open_picture(picture)
    except FastoryError as error:
        raise InputError(f"--first-frame: {error}") from error
    picture = picture.resolve() if isinstance(picture, Path) else picture
    return [replace(story, first_frame=picture) for story in read]


def _check_settings(settings: Settings | None, preset: str | None) -> None:
    """InputError for what is no Settings, and for a preset beside it."""
    if settings is not None and not isinstance(settings, Settings):
        raise InputError(
            f"settings: wanted a Settings object, got a {type(settings).__name__}; give single values by their names"
        )
    if settings is not None and preset is not None:
        raise InputError("a Settings object says everything, and so does a preset; give one of the two")


def _check_request(
    frames: Frames | None,
    redraw_seed: int | None,
    batch_size: int | None,
    *,
    overwrite: bool,
    somewhere: bool,
) -> None:
    """InputError for arguments that do not go together. somewhere: whether run folders are written."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size: wanted 1 or more, got {batch_size}")
    if frames is not None and overwrite:
        raise InputError("frames are redrawn in place, overwrite draws everything anew; give one of the two")
    if frames is not None and not somewhere:
        raise InputError("frames are redrawn in a finished run folder; say which with output")
    if redraw_seed is not None:
        if frames is None:
            raise InputError("redraw_seed is for the frames that are redrawn; say which with frames")
        check("seed", redraw_seed, "--redraw-seed")


def _open_folders(
    stories: Sequence[ResolvedStory],
    output: str | Path | None,
    under: str | Path | None,
    overwrite: bool,
    redraw_seed: int | None,
    stack: ExitStack,
) -> Opened:
    """Each story with its locked run folder, or None where nothing is to be written; `stack` will release them."""
    opened: Opened = []
    taken: set[Path] = set()
    for resolved, named in zip(stories, run_paths([r.story for r in stories], output), strict=True):
        if named is None and not under:
            opened.append((resolved, None))
            continue
        path = named or Path(under or "") / f"{resolved.story.slug}-{resolved.identity.digest()[:8]}"
        if path.resolve() in taken:
            raise InputError(f"{resolved.story.title!r} was given twice; wanted every story once")
        taken.add(path.resolve())
        opened.append(open_folder(resolved, path, overwrite=overwrite, redraw_seed=redraw_seed, stack=stack))
    return opened


def _draw(
    opened: Opened,
    batch_size: int | None,
    stack: ExitStack,
    listeners: Sequence[Callable[[Event], object]],
    executor: Executor,
) -> Iterator[Event]:
    """Draw story after story, causal ones side by side, with the run's own number of threads.

    The first thing it yields is no event of the story's: it says that the run folders will be released.
    """
    try:
        yield Notice("ready")
        runs = begin_runs(opened, batch_size, executor.processes)
        for event in _drawn(runs, executor):
            for listener in listeners:
                listener(event)
            yield event
    finally:
        stack.close()


def _drawn(runs: Sequence[StoryRun], executor: Executor) -> Iterator[Event]:
    """Stories of a mode with rounds one after the other, their frames on all processes; others are dealt over the processes."""
    groups = drawn_together(runs, len(executor.workers))
    for by_frame, several in groupby(
        groups, key=lambda group: mode_of(group[0].settings.mode).unit == "frame"
    ):
        yield from draw_groups(list(several), executor, [HERE] if by_frame else executor.workers)
