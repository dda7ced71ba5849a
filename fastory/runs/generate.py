"""From stories to pictures: settings resolved, run folders opened, the mode run, its events passed on."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastory import __version__
from fastory.errors import FastoryError, InputError
from fastory.events import (
    BatchChosen,
    BatchHalved,
    Event,
    FrameDrawn,
    Notice,
    RoundFinished,
    RoundStarted,
    StepDone,
    StoryFinished,
    StoryStarted,
)
from fastory.models.torch_model import NOT_FINITE, StoryModel
from fastory.modes.causal import Telling, causal, window_of
from fastory.modes.iterative import iterative
from fastory.pictures import open_picture
from fastory.runs.folder import Identity, RunFolder, run_paths
from fastory.runtime import choose_batch, under_threads
from fastory.sampling.sampler import frame_seed, is_guided, make_scheduler, rows_per_frame
from fastory.settings import Needs, Settings, check, resolve, unused
from fastory.story import Story, are_captions
from fastory.wording import counted

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
    given = [stories] if isinstance(stories, (Story, str, Path)) else list(stories)
    if not given:
        raise InputError("no story was given; wanted at least one story file")
    if not isinstance(stories, str) and are_captions(given):
        given = [Story.from_captions([str(text) for text in given])]
    read = [story if isinstance(story, Story) else Story.read(story) for story in given]
    if first_frame is not None:
        try:
            open_picture(Path(first_frame))
        except FastoryError as error:
            raise InputError(f"--first-frame: {error}") from error
        read = [replace(story, first_frame=Path(first_frame).resolve()) for story in read]
    opened = model if isinstance(model, StoryModel) else StoryModel.open(model)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size: wanted 1 or more, got {batch_size}")
    if frames is not None and overwrite:
        raise InputError("frames are redrawn in place, overwrite draws everything anew; give one of the two")
    if frames is not None and output is None and under is None:
        raise InputError("frames are redrawn in a finished run folder; say which with output")
    if redraw_seed is not None:
        if frames is None:
            raise InputError("redraw_seed is for the frames that are redrawn; say which with frames")
        check("seed", redraw_seed, "--redraw-seed")
    stack, taken = ExitStack(), set[Path]()
    try:
        jobs = [prepare(opened, story, settings, preset, frames, batch_size) for story in read]
        for job, path in zip(jobs, run_paths(read, output), strict=True):
            if path or under:
                open_folder(job, path, Path(under) if under else None, overwrite, redraw_seed, stack, taken)
    except BaseException:
        stack.close()
        raise
    events = run_jobs(jobs, batch_size, stack)
    next(events)  # a generator that was never begun would not release the folders when it is closed
    return events


def prepare(
    model: StoryModel,
    story: Story,
    flags: Mapping[str, Any],
    preset: str | None,
    frames: Sequence[int] | slice | None,
    batch_size: int | None,
) -> Job:
    """Resolve a story's settings and check them against the model."""
    for name, value in story.settings.items():
        check(name, value, story.where(f"settings.{name}") or "story")
    named = {"style": story.style, "negative_prompt": story.negative_prompt}
    own = {**story.settings, **{name: value for name, value in named.items() if value is not None}}
    settings, sources = resolve(flags, own, preset, model.defaults)
    width, height = model.native_size
    settings = replace(settings, width=settings.width or width, height=settings.height or height)
    check_drawable(model, story, settings, batch_size)
    story.prompt(0, settings.style)  # refuses an unknown style
    make_scheduler(model, settings.scheduler)  # refuses one that does not fit this UNet
    if settings.mode == "causal":
        window_of(model.require_history().encoder.config, settings, len(story.frames))
    else:
        pictures = any(character.references for character in story.characters)
        if settings.iterations > 0 or (pictures and settings.reference_start <= settings.iterations):
            model.require_references()
    notices = [*unused(settings, sources, needs_of(model, story, settings)), *unused_of(story, settings)]
    return Job(
        model, story, settings, sources, None, None, frames_to_redraw(frames, story, settings), notices
    )


def needs_of(model: StoryModel, story: Story, settings: Settings) -> Needs:
    """What decides whether a setting is used."""
    return Needs(
        pictures=any(character.references for character in story.characters),
        guided=is_guided(model, settings),
        seeded=all(frame.seed is not None for frame in story.frames),
        begun=story.first_frame is not None,
    )


def unused_of(story: Story, settings: Settings) -> Iterator[str]:
    """A line for what stands in the story itself and decides nothing."""
    for name, own in (("style", story.style), ("negative_prompt", story.negative_prompt)):
        if own is not None and name in story.settings:
            yield f"`settings: {name}` is not used: the story says `{name}:` itself, which comes first"
    if settings.mode != "iterative":
        return  # pictures of characters are told of as a whole
    for character in story.characters:
        if character.scale is not None and not character.references:
            yield f"`scale` of {character.name} is not used: it is the weight of pictures, and none are given"
        if character.references and settings.reference_start > settings.iterations:
            yield (
                f"the pictures of {character.name} are not used: they count from round {settings.reference_start} on "
                f"(reference_start), and the last round is {settings.iterations}"
            )


def check_drawable(model: StoryModel, story: Story, settings: Settings, batch_size: int | None) -> None:
    """InputError for a size, references or a micro-batch that this model cannot draw."""
    pictures = [character.references for character in story.characters if character.references]
    iterative_mode = settings.mode == "iterative"
    # A null block ends every group.
    references = len(story.frames) + 1 + sum(len(own) + 1 for own in pictures) if iterative_mode else 0
    groups = 1 + len(pictures) if iterative_mode else 0
    rows = (batch_size or 1) * rows_per_frame(model, settings)
    model.check_drawable(settings.width or 0, settings.height or 0, references, groups, rows)


def frames_to_redraw(
    frames: Sequence[int] | slice | None, story: Story, settings: Settings
) -> tuple[int, ...] | None:
    """The frames' numbers. Raises InputError for an empty choice, and in causal mode for one that does not run to the end."""
    if frames is None:
        return None
    count = len(story.frames)
    wanted = tuple(range(count))[frames] if isinstance(frames, slice) else tuple(sorted(set(frames)))
    if outside := [i for i in wanted if not isinstance(i, int) or i < 0]:
        raise InputError(f"--frames: wanted numbers from 0 on, got {outside[0]!r}")
    if not wanted:
        raise InputError(
            f"--frames: {story.title!r} has the frames 0 to {count - 1}, and none of them was chosen"
        )
    if settings.mode == "causal" and wanted != tuple(range(wanted[0], max(count, wanted[-1] + 1))):
        raise InputError(
            f"--frames: in causal mode every later frame depends on an earlier one; wanted a first frame to redraw "
            f"from, such as {wanted[0]}-"
        )
    return wanted


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
        exists = not folder.draw_anew(identity)
    if exists:
        folder.check(identity, job.frames)
        job.model = job.model.on(folder.manifest["machine"])
        job.notices += version_notices(folder.manifest["machine"]["versions"])
        if job.frames is None and folder.manifest.get("redraw") and not identity.changed(folder.manifest):
            job.notices.append(folder.give_up_redraw())
        job.notices += restored(folder, job.story, identity)
    job.folder, job.identity = folder, identity
    drawn_from = partial(noise_seeds, job.story, job.settings)
    if (
        job.frames is not None
        and exists
        and not folder.begin_redraw(identity, job.frames, redraw_seed, drawn_from)
    ):
        job.notices.append("nothing to redraw: neither caption nor seed of these frames changed")


def restored(folder: RunFolder, story: Story, identity: Identity) -> list[str]:
    """A notice where the folder's story.yaml was edited, unless it is the file that the story was read from."""
    if identity.changed(folder.manifest) or folder.manifest.get("redraw"):
        return []  # a redraw writes story.yaml anew
    notice = folder.restore_story(story)
    own = story.source is not None and story.source.resolve() == (folder.path / "story.yaml").resolve()
    return [notice] if notice and not own else []


def noise_seeds(story: Story, settings: Settings, redraw_seeds: Mapping[int, int]) -> dict[int, int]:
    """The seed that each frame's noise is drawn from: --redraw-seed, the frame's own, the run's."""
    return {
        i: frame_seed(frame.seed, redraw_seeds.get(i), settings, i) for i, frame in enumerate(story.frames)
    }


def run_jobs(jobs: Sequence[Job], batch_size: int | None, stack: ExitStack) -> Iterator[Event]:
    """Draw story after story, causal ones side by side, with the run's own number of threads.

    The first thing it yields is no event of the story's: it says that the run folders will be released.
    """
    try:
        yield Notice("ready")
        for group in side_by_side([begin(job, place, batch_size, jobs) for place, job in enumerate(jobs)]):
            yield from under_threads(group[0].threads, draw_stories(group))
    finally:
        stack.close()


@dataclass
class Begun:
    """A job whose run folder stands. sizes: its micro-batches by round (iterative) or by frame (causal)."""

    job: Job
    place: int
    sizes: list[int]
    reason: str
    threads: int
    started: float = 0.0

    def company(self) -> tuple[Any, ...]:
        """Equal for causal stories that can be drawn in one batch."""
        settings = self.job.settings
        if settings.mode != "causal":
            return (self.place,)
        shared = replace(settings, seed=0, noise="", style=None, negative_prompt="")
        window = settings.window if settings.window != "all" else ("all", len(self.job.story.frames))
        return (id(self.job.model), shared, window, tuple(self.sizes), self.threads)


def begin(job: Job, place: int, batch_size: int | None, jobs: Sequence[Job]) -> Begun:
    """Choose the micro-batch and write the manifest of a new run; a resumed one keeps its sizes and threads."""
    causal_jobs = sum(other.settings.mode == "causal" for other in jobs)
    count = causal_jobs if job.settings.mode == "causal" else len(job.story.frames)
    size, reason = micro_batch(job.model, job.settings, count, batch_size)
    folder = job.folder
    if folder is None:
        return Begun(job, place, [size], reason, job.model.placement.threads)
    assert job.identity is not None
    if not folder.manifest:
        machine = {**job.model.placement.as_dict(), "versions": versions()}
        folder.begin(job.identity, job.story, job.sources, machine, size)
    stored = folder.batch_sizes()
    if stored[-1] != size:
        reason = f"{stored[-1]} at once, as this run folder began"
    return Begun(job, place, stored, reason, folder.manifest["machine"]["threads"])


def side_by_side(begun: Sequence[Begun]) -> list[list[Begun]]:
    """Stories that are drawn together, in the order of the first of each group."""
    groups: dict[tuple[Any, ...], list[Begun]] = {}
    for one in begun:
        groups.setdefault(one.company(), []).append(one)
    return list(groups.values())


def draw_stories(group: Sequence[Begun]) -> Generator[Event, None, None]:
    """What is missing of these stories is drawn, then final pictures, sheets and storybooks are written."""
    missing: list[Begun] = []
    for one in group:
        job, folder, rounds, count = (
            one.job,
            one.job.folder,
            one.job.settings.rounds,
            len(one.job.story.frames),
        )
        one.started = time.monotonic()
        done = folder.count(rounds, count) if folder else 0
        path = folder.path if folder else None
        yield StoryStarted(
            job.story.title, count, rounds, job.settings.steps, done, rounds * count, path, one.place
        )
        for notice in [*job.notices, *story_notices(job.model, job.story, job.settings)]:
            yield Notice(notice)
        if done < rounds * count:
            missing.append(one)
    drawn = Drawn({one.place: one.job for one in group})
    for one in missing:
        drawn.refuse_lost_round(one.place, drawn.newest_round(one.place))
    if missing:
        yield BatchChosen(group[0].sizes[-1], group[0].reason)
        yield from drawn.watch(record(drawn.jobs, events_of(group)))
    lost = [one.place for one in group if drawn.is_lost(one.place, one.job.settings.rounds - 1)]
    for one in group:
        if one.place not in lost:
            yield finish(one.job.folder, one.job.model, one.job.story, one.job.settings, one.started)
    for place in lost:
        drawn.refuse_lost_round(place, drawn.jobs[place].settings.rounds - 1)


@dataclass
class Drawn:
    """Why pictures of a group are left out, those drawn now and those of the run folders. jobs: by place in the call.

    A round in which no picture is finite makes a story of black pictures: nothing is drawn from it.
    """

    jobs: Mapping[int, Job]
    reasons: dict[tuple[int, int, int], str | None] = field(default_factory=dict)

    def watch(self, events: Iterator[Event]) -> Iterator[Event]:
        """Pass events on; FastoryError after a round of iterative mode that is lost."""
        for event in events:
            yield event
            if isinstance(event, FrameDrawn):
                self.reasons[event.place, event.round, event.frame] = event.left_out
            elif isinstance(event, RoundFinished):  # of iterative mode, where a group is one story
                (place,) = self.jobs
                self.refuse_lost_round(place, event.round)

    def newest_round(self, place: int) -> int:
        """The last round that the run folder has whole, or -1."""
        folder, frames = self.jobs[place].folder, range(len(self.jobs[place].story.frames))
        rounds = reversed(range(self.jobs[place].settings.rounds))
        return next((k for k in rounds if folder and all(folder.has(k, i) for i in frames)), -1)

    def is_lost(self, place: int, round: int) -> bool:
        """Whether no picture of a finished round is finite."""
        frames = range(len(self.jobs[place].story.frames))
        return round >= 0 and all(self._reason(place, round, i) == NOT_FINITE for i in frames)

    def _reason(self, place: int, round: int, frame: int) -> str | None:
        folder = self.jobs[place].folder
        if (place, round, frame) in self.reasons or folder is None:
            return self.reasons.get((place, round, frame))
        return folder.load(round, frame)[1]

    def refuse_lost_round(self, place: int, round: int) -> None:
        """FastoryError that says what helps, where is_lost."""
        if not self.is_lost(place, round):
            return
        job = self.jobs[place]
        dtype = job.model.placement.dtype_name
        wider = f" or {dtype} is too narrow for them (--dtype float32)" if dtype != "float32" else ""
        kept = (
            f"; what was drawn is kept in {job.folder.path}, draw it anew with --overwrite"
            if job.folder
            else ""
        )
        raise FastoryError(
            f"{job.story.title!r}: no picture of round {round} has finite values. The weights of the model, an adapter or "
            f"a LoRA are damaged{wider}{kept}"
        )


def events_of(group: Sequence[Begun]) -> Iterator[Event]:
    """The mode's events. All stories of a group take part, finished ones too: they keep the others' places."""
    first = group[0].job
    if first.settings.mode == "causal":
        tellings = [telling_of(one) for one in group]
        size = (first.settings.width or 0, first.settings.height or 0)
        yield from causal(first.model, tellings, batch_sizes=group[0].sizes, size=size)
        return
    seeds = first.folder.seeds() if first.folder else None
    for event in iterative(
        first.model,
        first.story,
        first.settings,
        batch_sizes=group[0].sizes,
        finished=first.folder,
        seeds=seeds,
    ):
        if isinstance(event, StepDone) or isinstance(event, FrameDrawn):  # noqa: SIM101  # mypy narrows these apart
            event = replace(event, place=group[0].place)
        yield event


def telling_of(one: Begun) -> Telling:
    """A story as causal mode takes it."""
    folder = one.job.folder
    if folder is None:
        return Telling(one.place, one.job.story, one.job.settings)
    return Telling(one.place, one.job.story, one.job.settings, folder, folder.seeds())


def micro_batch(model: StoryModel, settings: Settings, count: int, asked: int | None) -> tuple[int, str]:
    """How many of `count` are denoised at once, frames of a round or stories side by side, and why."""
    what = "story" if settings.mode == "causal" else "frame"
    if asked is not None:
        return min(asked, count), f"{min(asked, count)} of {counted(count, what)} at once, as asked for"
    factor = model.vae_factor
    width, height = (settings.width or 0) // factor, (settings.height or 0) // factor
    guided = is_guided(model, settings)
    return choose_batch(model.unet, model.placement, width, height, guided, count, what)


def record(jobs: Mapping[int, Job], events: Iterator[Event]) -> Iterator[Event]:
    """Pass events on; pictures and halvings go into the run folders first. jobs: by the story's place in the call."""
    before = time.monotonic()
    for event in events:
        match event:
            case FrameDrawn() if (folder := jobs[event.place].folder) is not None:
                now, job = time.monotonic(), jobs[event.place]
                chunks = png_chunks(job.story, job.settings, job.model, event)
                before, event = now, replace(event, path=folder.save(event, chunks, now - before))
            case BatchHalved():
                for job in jobs.values():
                    if job.folder is not None and event.frame is None:
                        job.folder.halve(event.round, event.size)
                    elif job.folder is not None and event.frame is not None:
                        job.folder.halve_from(event.frame, event.size)
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
        folder.finish(story, settings.rounds, footer(model, settings))
    path = folder.path
    return StoryFinished(
        story.title, path, path / "sheet.png", path / "storybook.html", time.monotonic() - started
    )


def footer(model: StoryModel, settings: Settings) -> dict[str, str]:
    """The settings as the storybook prints them."""
    first, last = settings.reference_scale
    if settings.mode == "causal":
        window = settings.window
        method = {"Window": counted(window, "frame") if isinstance(window, int) else "all earlier frames"}
        method |= {"Drafts": f"{settings.drafts} of frame 0"} if settings.drafts else {}
    else:
        scale = f"reference scale {first:g} to {last:g}"
        method = {"Rounds": f"{settings.iterations}, {scale}, references {settings.references}"}
    return {
        "Model": Path(model.name).name,
        "Mode": settings.mode,
        **method,
        "Sampling": f"{settings.scheduler}, {counted(settings.steps, 'step')}, guidance {settings.guidance_scale:g}",
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
        "mode": settings.mode,
        "rounds": settings.rounds - 1,
        "prompt": prompt,
        "seed": drawn.seed,
        "left_out": drawn.left_out,
    }
    if settings.mode == "causal":
        values |= {"window": settings.window, "drafts": settings.drafts}
    else:
        values["reference_scale"] = settings.reference_scale_of(drawn.round) if drawn.round else 0.0
        values["references"] = settings.references
    return {"parameters": "\n".join(lines), "fastory": json.dumps(values, ensure_ascii=False)}


def story_notices(model: StoryModel, story: Story, settings: Settings) -> Iterator[str]:
    """What the user should know before drawing begins."""
    if settings.mode == "iterative" and not settings.iterations:
        yield "0 iterations: every frame is drawn from its caption alone"
    if model.name == "builtin":
        yield from size_notice(model, settings)
    if any(frame.boxes for frame in story.frames):
        yield "`boxes` are reserved: this version checks them and does not use them"
    if story.first_frame is not None and settings.mode != "causal":
        yield "`first_frame` is read by causal mode alone; this story is drawn without it"
    if settings.mode == "causal" and any(character.references for character in story.characters):
        yield "pictures of characters are read by iterative mode alone; causal mode goes by earlier frames"
    if model.name == "builtin":
        from fastory.builtin.captions import notice_of, unknown_words

        names = {character.name: "" for character in story.characters}
        text = " ".join(story.prompt(i, settings.style) for i in range(len(story.frames)))
        if unknown := unknown_words(text, names, tokenizer=model.pipeline.tokenizer):
            yield notice_of(unknown)


def size_notice(model: StoryModel, settings: Settings) -> Iterator[str]:
    """Where the built-in model does not draw what captions say any more: it was trained at one small size."""
    width, height = model.native_size
    sides = ((settings.width or width, width), (settings.height or height, height))
    # Looked at: at 1.25 of a side pictures are smudged here and there; at 1.5 animals come twice, at 0.75 colours are lost.
    if not all(own <= side <= 1.25 * own for side, own in sides):
        yield (
            f"the built-in model was trained at {width} x {height} pixels; at {settings.width} x {settings.height} it repeats "
            "its animals or smears them: leave out width and height, or give a checkpoint with --model"
        )


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
