"""From stories to pictures: the door. Settings resolved, run folders opened, stories drawn, events passed on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastory.errors import FastoryError, InputError
from fastory.events import Event, Notice
from fastory.models.protocol import Model
from fastory.models.torch_model import StoryModel
from fastory.pictures import open_picture
from fastory.runs.drawing import draw_group
from fastory.runs.folder import RunFolder, run_paths
from fastory.runs.resolve import Frames, ResolvedStory, resolve_story
from fastory.runs.story_run import begin_runs, drawn_together, open_folder
from fastory.runtime import under_threads
from fastory.settings import check
from fastory.story import Story, are_captions

Opened = list[tuple[ResolvedStory, RunFolder | None]]


def generate(
    stories: Story | str | Path | Sequence[Story | str | Path],
    *,
    model: Model | str = "builtin",
    preset: str | None = None,
    output: str | Path | None = None,
    under: str | Path | None = None,
    overwrite: bool = False,
    frames: Sequence[int] | slice | None = None,
    redraw_seed: int | None = None,
    batch_size: int | None = None,
    first_frame: str | Path | None = None,
    **settings: Any,
) -> Iterator[Event]:
    """Draw one story or many; yields events, among them every picture as it is finished.

    stories: Story objects or story files; a list of texts of which none is a file, or has the suffix of one, is the captions
    of one story, as Story.from_captions takes them. model: an opened StoryModel, or what StoryModel.open takes. output: the run
    folder (with several stories, the folder of their run folders); under: a folder in which run folders are named by
    story and settings. Without both, nothing is written. frames: only redraw these, in a finished run folder; in causal
    mode all from one on, as a slice(k, None). Causal stories with the same settings are drawn side by side, and
    first_frame of a story (or of all, as an argument) is its given frame 0.
    settings: fields of Settings, over those of the story file, the preset and the model's folder.

    Everything is checked before the first event: raises InputError for what cannot be used. While drawing, raises
    FastoryError for a full disk or for memory that does not suffice for one frame.
    """
    read = _read_stories(stories, first_frame)
    opened_model: Model = StoryModel.open(model) if isinstance(model, (str, Path)) else model
    somewhere = output is not None or under is not None
    _check_request(frames, redraw_seed, batch_size, overwrite=overwrite, somewhere=somewhere)
    resolved = [
        resolve_story(opened_model, story, settings, preset=preset, redrawn=frames, batch_size=batch_size)
        for story in read
    ]
    stack = ExitStack()
    try:
        opened = _open_folders(resolved, output, under, overwrite, redraw_seed, stack)
    except BaseException:
        stack.close()
        raise
    events = _draw(opened, batch_size, stack)
    next(events)  # a generator that was never begun would not release the folders when it is closed
    return events


def _read_stories(
    stories: Story | str | Path | Sequence[Story | str | Path], first_frame: str | Path | None
) -> list[Story]:
    """The stories, files read and captions taken as one story; with `first_frame` as the frame 0 of all, if it is given."""
    listed = [stories] if isinstance(stories, (Story, str, Path)) else list(stories)
    if not listed:
        raise InputError("no story was given; wanted at least one story file")
    if not isinstance(stories, str) and are_captions(listed):
        listed = [Story.from_captions([str(text) for text in listed])]
    read = [story if isinstance(story, Story) else Story.read(story) for story in listed]
    if first_frame is None:
        return read
    try:
        open_picture(Path(first_frame))
    except FastoryError as error:
        raise InputError(f"--first-frame: {error}") from error
    return [replace(story, first_frame=Path(first_frame).resolve()) for story in read]


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


def _draw(opened: Opened, batch_size: int | None, stack: ExitStack) -> Iterator[Event]:
    """Draw story after story, causal ones side by side, with the run's own number of threads.

    The first thing it yields is no event of the story's: it says that the run folders will be released.
    """
    try:
        yield Notice("ready")
        for group in drawn_together(begin_runs(opened, batch_size)):
            yield from under_threads(group[0].threads, draw_group(group))
    finally:
        stack.close()
