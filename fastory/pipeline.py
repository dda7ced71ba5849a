"""From stories to pictures: settings resolved, run folders opened, the mode run, its events passed on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastory import __version__
from fastory.errors import InputError
from fastory.events import (
    BatchChosen,
    BatchHalved,
    Event,
    FrameDrawn,
    Notice,
    RoundFinished,
    RoundStarted,
    StoryFinished,
    StoryStarted,
)
from fastory.model import StoryModel
from fastory.modes.iterative import iterative
from fastory.placement import choose_batch
from fastory.run import Identity, RunFolder
from fastory.sampler import make_scheduler
from fastory.settings import Settings, check, resolve
from fastory.story import Story

VERSIONED = ("torch", "diffusers", "transformers", "safetensors", "pillow")


@dataclass
class Job:
    """One story with its resolved settings and, where one was asked for, its locked run folder."""

    model: StoryModel
    story: Story
    settings: Settings
    sources: dict[str, str]
    folder: RunFolder | None
    identity: Identity | None
    frames: tuple[int, ...] | None
    notices: list[str]


def generate(
    stories: Story | str | Path | Sequence[Story | str | Path],
    *,
    model: StoryModel | str = "builtin",
    preset: str | None = None,
    output: str | Path | None = None,
    under: str | Path | None = None,
    overwrite: bool = False,
    frames: Sequence[int] | None = None,
    redraw_seed: int | None = None,
    batch_size: int | None = None,
    **settings: Any,
) -> Iterator[Event]:
    """Draw one story or many; yields events, among them every picture as it is finished.

    stories: Story objects or story files. model: an opened StoryModel, or what StoryModel.open takes. output: the run
    folder (with several stories, the folder of their run folders); under: a folder in which run folders are named by
    story and settings. Without both, nothing is written. frames: only redraw these, in a finished run folder.
    settings: fields of Settings, over those of the story file, the preset and the model's folder.

    Everything is checked before the first event: raises InputError for what cannot be used. While drawing, raises
    FastoryError for a full disk or for memory that does not suffice for one frame.
    """
    given = [stories] if isinstance(stories, (Story, str, Path)) else list(stories)
    if not given:
        raise InputError("no story was given; wanted at least one story file")
    read = [story if isinstance(story, Story) else Story.read(story) for story in given]
    opened = model if isinstance(model, StoryModel) else StoryModel.open(model)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size: wanted 1 or more, got {batch_size}")
    if frames is not None and overwrite:
        raise InputError("frames are redrawn in place, overwrite draws everything anew; give one of the two")
    if frames is not None and output is None and under is None:
        raise InputError("frames are redrawn in a finished run folder; say which with output")
    stack, taken = ExitStack(), set[Path]()
    try:
        jobs = [prepare(opened, story, settings, preset, frames) for story in read]
        for job, path in zip(jobs, run_paths(read, output), strict=True):
            if path or under:
                open_folder(job, path, Path(under) if under else None, overwrite, redraw_seed, stack, taken)
    except BaseException:
        stack.close()
        raise
    return run_jobs(jobs, batch_size, stack)


def run_paths(stories: Sequence[Story], output: str | Path | None) -> list[Path | None]:
    """One run folder a story: `output` itself, or with several stories output/<slug>, numbered where slugs repeat."""
    if output is None:
        return [None] * len(stories)
    if len(stories) == 1:
        return [Path(output)]
    slugs: list[str] = []
    for story in stories:
        slug, n = story.slug, 2
        while slug in slugs:
            slug, n = f"{story.slug}-{n}", n + 1
        slugs.append(slug)
    return [Path(output) / slug for slug in slugs]


def prepare(
    model: StoryModel,
    story: Story,
    flags: Mapping[str, Any],
    preset: str | None,
    frames: Sequence[int] | None,
) -> Job:
    """Resolve a story's settings and check them against the model."""
    for name, value in story.settings.items():
        check(name, value, story.where(f"settings.{name}") or "story")
    own = {**story.settings, "style": story.style, "negative_prompt": story.negative_prompt}
    settings, sources = resolve(flags, own, preset, model.defaults)
    width, height = model.native_size
    settings = replace(settings, width=settings.width or width, height=settings.height or height)
    for name in ("width", "height"):
        value = getattr(settings, name)
        if value % model.size_factor:
            lower = value // model.size_factor * model.size_factor
            raise InputError(
                f"{name}: wanted a multiple of {model.size_factor} pixels for this UNet, got {value}; "
                f"the nearest are {lower or model.size_factor} and {lower + model.size_factor}"
            )
    story.prompt(0, settings.style)  # refuses an unknown style
    make_scheduler(model, settings.scheduler)  # refuses one that does not fit this UNet
    pictures = any(character.references for character in story.characters)
    if settings.iterations > 0 or (pictures and settings.reference_start <= settings.iterations):
        model.require_references()
    wanted = None if frames is None else tuple(sorted(set(frames)))
    return Job(model, story, settings, sources, None, None, wanted, [])


def open_folder(
    job: Job,
    path: Path | None,
    under: Path | None,
    overwrite: bool,
    redraw_seed: int | None,
    stack: ExitStack,
    taken: set[Path],
) -> None:
    """Lock and check the job's run folder; begin it, resume it, or take up a redraw."""
    identity = Identity.of(job.story, job.settings, job.model.hashes, job.model.asked_dtype)
    assert path or under
    path = path or (under or Path()) / f"{job.story.slug}-{identity.digest()[:8]}"
    if path.resolve() in taken:
        raise InputError(f"{job.story.title!r} was given twice; wanted every story once")
    taken.add(path.resolve())
    if job.frames is not None and not (path / "manifest.json").exists():
        raise InputError(
            f"there is no run to redraw in {path}; draw the story first, or name its folder with --output "
            "(an edited story has another default folder)"
        )
    folder = RunFolder(path)
    stack.callback(folder.close)
    exists = folder.read()
    if exists and overwrite:
        folder.manifest = {}  # the files go when drawing begins: a later story may still be refused
        exists = False
    if exists:
        folder.check(identity, job.frames)
        job.model = job.model.on(folder.manifest["machine"])
        job.notices += version_notices(folder.manifest["machine"]["versions"])
    job.folder, job.identity = folder, identity
    if job.frames is not None and exists:
        rounds = job.settings.iterations + 1
        if not folder.begin_redraw(identity, job.frames, redraw_seed, rounds):
            job.notices.append("nothing to redraw: neither caption nor seed of these frames changed")


def run_jobs(jobs: Sequence[Job], batch_size: int | None, stack: ExitStack) -> Iterator[Event]:
    """Draw story after story, with the run's own number of threads."""
    threads = torch.get_num_threads()
    try:
        for job in jobs:
            yield from draw_story(job, batch_size)
    finally:
        torch.set_num_threads(threads)
        stack.close()


def draw_story(job: Job, batch_size: int | None) -> Iterator[Event]:
    """One story: what is missing is drawn, then the final pictures, the sheet and the storybook are written."""
    model, story, settings, folder, started = job.model, job.story, job.settings, job.folder, time.monotonic()
    rounds, count = settings.iterations + 1, len(job.story.frames)
    size, reason = micro_batch(model, settings, count, batch_size)
    if folder is not None:
        assert job.identity is not None
        if not folder.manifest:
            folder.clear()
            machine = {**model.placement.as_dict(), "versions": versions()}
            folder.begin(job.identity, story, job.sources, machine, size)
        stored = folder.batch_sizes()
        if stored[-1] != size:
            reason = f"{stored[-1]} frames at once, as this run folder began"
        sizes = stored
        torch.set_num_threads(folder.manifest["machine"]["threads"])
    else:
        sizes = [size]
    done = folder.count(rounds, count) if folder else 0
    yield StoryStarted(
        story.title, count, rounds, settings.steps, done, rounds * count, folder.path if folder else None
    )
    for notice in [*job.notices, *story_notices(model, story, settings)]:
        yield Notice(notice)
    if done < rounds * count:
        yield BatchChosen(sizes[-1], reason)
        events = iterative(
            model,
            story,
            settings,
            batch_sizes=sizes,
            finished=folder,
            seeds=folder.seeds() if folder else None,
        )
        yield from events if folder is None else record(folder, story, settings, model, events)
    yield finish(folder, model, story, settings, started)


def micro_batch(model: StoryModel, settings: Settings, frames: int, asked: int | None) -> tuple[int, str]:
    """Frames at once, and why."""
    if asked is not None:
        return min(asked, frames), f"{min(asked, frames)} of {frames} frames at once, as asked for"
    factor = model.vae_factor
    width, height = (settings.width or 0) // factor, (settings.height or 0) // factor
    return choose_batch(model.unet, model.placement, width, height, settings.guidance_scale > 1, frames)


def record(
    folder: RunFolder, story: Story, settings: Settings, model: StoryModel, events: Iterator[Event]
) -> Iterator[Event]:
    """Pass events on; pictures and halvings go into the run folder first."""
    before = time.monotonic()
    for event in events:
        match event:
            case FrameDrawn():
                now = time.monotonic()
                path = folder.save(event, png_chunks(story, settings, model, event), now - before)
                before, event = now, replace(event, path=path)
            case BatchHalved():
                folder.halve(event.round, event.size)
            case RoundStarted() | RoundFinished():
                before = time.monotonic()
        yield event


def finish(
    folder: RunFolder | None, model: StoryModel, story: Story, settings: Settings, started: float
) -> StoryFinished:
    """Move a redraw in, write what is to be looked at, and say where it is."""
    if folder is None:
        return StoryFinished(story.title, None, None, None, time.monotonic() - started)
    if folder.manifest.get("redraw"):
        folder.end_redraw(story)
    if not folder.complete():
        folder.finish(story, settings.iterations + 1, footer(model, settings))
    path = folder.path
    return StoryFinished(
        story.title, path, path / "sheet.png", path / "storybook.html", time.monotonic() - started
    )


def footer(model: StoryModel, settings: Settings) -> dict[str, str]:
    """The settings as the storybook prints them."""
    first, last = settings.reference_scale
    return {
        "Model": Path(model.name).name,
        "Mode": settings.mode,
        "Rounds": f"{settings.iterations}, reference scale {first:g} to {last:g}, references {settings.references}",
        "Sampling": f"{settings.scheduler}, {settings.steps} steps, guidance {settings.guidance_scale:g}",
        "Noise": f"{settings.noise}, seed {settings.seed}",
        "Size": f"{settings.width} x {settings.height}",
    }


def png_chunks(story: Story, settings: Settings, model: StoryModel, drawn: FrameDrawn) -> dict[str, str]:
    """Text chunks of a picture: `parameters`, as picture viewers of the field read it, and `fastory`, as JSON."""
    prompt = story.prompt(drawn.frame, settings.style)
    lines = [prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(
        f"Steps: {settings.steps}, Sampler: {settings.scheduler}, CFG scale: {settings.guidance_scale:g}, "
        f"Seed: {drawn.seed}, Size: {settings.width}x{settings.height}, Model: {Path(model.name).name}"
    )
    values = {
        "schema": 1,
        "version": __version__,
        "story": story.title,
        "frame": drawn.frame,
        "round": drawn.round,
        "rounds": settings.iterations,
        "prompt": prompt,
        "seed": drawn.seed,
        "reference_scale": settings.reference_scale_of(drawn.round) if drawn.round else 0.0,
        "references": settings.references,
        "left_out": drawn.left_out,
    }
    return {"parameters": "\n".join(lines), "fastory": json.dumps(values, ensure_ascii=False)}


def story_notices(model: StoryModel, story: Story, settings: Settings) -> Iterator[str]:
    """What the user should know before drawing begins."""
    if not settings.iterations:
        yield "0 iterations: every frame is drawn from its caption alone"
    if story.first_frame is not None or any(frame.boxes for frame in story.frames):
        yield "`first_frame` and `boxes` are reserved: this version checks them and does not use them"
    if model.name == "builtin":
        from fastory.builtin.captions import unknown_words

        names = {character.name: "" for character in story.characters}
        text = " ".join(story.prompt(i, settings.style) for i in range(len(story.frames)))
        yield from map(str, unknown_words(text, names, tokenizer=model.pipeline.tokenizer))


def versions() -> dict[str, str]:
    """Versions of fastory and of what decides a picture's bytes."""
    return {"fastory": __version__, **{name: version(name) for name in VERSIONED}}


def version_notices(stored: Mapping[str, str]) -> list[str]:
    """One notice where a run is taken up again with other library versions."""
    now = versions()
    changed = [
        f"{name} {stored[name]} -> {now[name]}"
        for name in now
        if name in stored and stored[name] != now[name]
    ]
    if not changed:
        return []
    return [
        f"this run began with other versions ({', '.join(changed)}); its remaining pictures may differ in their last bits"
    ]
