"""A story's run: its run folder opened, its micro-batch chosen, the stories that are drawn side by side found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastory.errors import InputError
from fastory.models.protocol import Model
from fastory.modes.mode import mode_of
from fastory.runs import attending, compiling
from fastory.runs.folder import RunFolder
from fastory.runs.provenance import version_notices, versions
from fastory.runs.redraw import begin_redraw, finish_move, give_up_redraw, refuse_unrepeatable
from fastory.runs.resolve import ResolvedStory
from fastory.runtime import choose_batch, frame_bytes, release_memory
from fastory.sampling.noise import frame_seed
from fastory.sampling.sampler import is_guided, rows_per_frame
from fastory.settings import LATEST_AT_ONCE, Settings
from fastory.story import Story
from fastory.wording import counted, numbers_listed


@dataclass(frozen=True)
class StoryRun:
    """One story of a call, ready to be drawn. index: in the call, from 0. folder: locked, or None where nothing is written.

    prompts: one a frame. sizes: the micro-batch, in frames by round (iterative) or in stories by frame (causal); the last
    entry stands for all later ones; reason: why that many. threads: of PyTorch. notices: for the user, before it begins.
    """

    model: Model
    story: Story
    settings: Settings
    prompts: tuple[str, ...]
    index: int
    folder: RunFolder | None
    sizes: tuple[int, ...]
    reason: str
    threads: int
    notices: tuple[str, ...]

    @property
    def batch_key(self) -> Hashable:
        """Equal for stories that can be drawn in one batch."""
        key = mode_of(self.settings.mode).group(self.story, self.settings)
        if key is None:
            return (self.index,)
        return (self.settings.mode, id(self.model), key, self.sizes, self.threads)


def open_folder(
    resolved: ResolvedStory,
    path: Path,
    *,
    overwrite: bool = False,
    redraw_seed: int | None = None,
    stack: ExitStack,
) -> tuple[ResolvedStory, RunFolder]:
    """Lock and check the run folder at `path`, to be begun or resumed, or take up a redraw; `stack` will release it.

    Returns the story too, with the model where the folder's run is drawn, and with further notices.
    """
    if resolved.redrawn is not None and not (path / "manifest.json").exists():
        raise InputError(
            f"there is no run to redraw in {path}; draw the story first, or name its folder with --output "
            "(an edited story has another default folder)"
        )
    folder = RunFolder(path)
    stack.callback(folder.close)
    exists = folder.read()
    if exists and not overwrite:
        resolved = resolved.as_in_run(folder.manifest["settings"])
    identity = resolved.identity
    finish_move(folder)
    if exists and overwrite:
        exists = not folder.draw_anew(identity)
    if not exists:
        return resolved, folder
    folder.check(identity, resolved.redrawn)
    machine = folder.manifest["machine"]
    model = compiling.as_began(resolved.model.on(machine), machine.get("compiled", False))
    model = attending.as_began(model, machine, resolved.settings)
    notices = version_notices(folder.manifest["machine"]["versions"])
    if resolved.redrawn is None and folder.manifest.get("redraw") and not identity.changed(folder.manifest):
        notices.append(give_up_redraw(folder))
    notices += _restore_story(folder, resolved)
    noise_seed = partial(_noise_seed, resolved.story, resolved.settings)
    recast = [i for i in identity.recast(folder.manifest) if i not in (resolved.redrawn or ())]
    redrawing = resolved.redrawn is not None and begin_redraw(
        folder, resolved.story, identity, resolved.redrawn, redraw_seed, noise_seed
    )
    if not redrawing:
        refuse_unrepeatable(folder, recast)
    if recast:
        notices.append(
            f"frames {numbers_listed(recast)} stay as they were drawn, with what the story said of their characters then; "
            f"--frames {numbers_listed(recast)} draws them as it says now"
        )
    if resolved.redrawn is not None and not redrawing:
        notices.append("nothing to redraw: neither caption nor seed of these frames changed")
    return replace(resolved, model=model, notices=(*resolved.notices, *notices)), folder


def _restore_story(folder: RunFolder, resolved: ResolvedStory) -> list[str]:
    """A notice where the folder's story.yaml was edited, unless it is the file that the story was read from."""
    if resolved.identity.changed(folder.manifest) or folder.manifest.get("redraw"):
        return []  # a redraw writes story.yaml anew
    source = resolved.story.source
    notice = folder.restore_story(resolved.story)
    own = source is not None and source.resolve() == (folder.path / "story.yaml").resolve()
    return [notice] if notice and not own else []


def _noise_seed(
    story: Story, settings: Settings, redraw_seeds: Mapping[int, int], frame: int, round: int
) -> int:
    """The seed that a frame's noise is drawn from in a round: --redraw-seed, the frame's own, the run's."""
    return frame_seed(story.frames[frame].seed, redraw_seeds.get(frame), settings, frame, round)


def begin_runs(
    opened: Sequence[tuple[ResolvedStory, RunFolder | None]], batch_size: int | None, processes: int = 1
) -> list[StoryRun]:
    """Choose the micro-batches and write the manifests of new runs; a resumed one keeps its sizes and threads.

    batch_size: as asked for, or None. processes: that draw them together.
    """
    stories = Counter(resolved.settings.mode for resolved, _ in opened)
    fresh = [resolved for resolved, folder in opened if folder is None or not folder.manifest]
    compiled, why = compiling.decide(fresh)
    runs = []
    for index, (resolved, folder) in enumerate(opened):
        if folder is None or not folder.manifest:
            as_fresh = resolved.model.compiled if compiled else resolved.model
            notices = (*resolved.notices, why) if why and resolved is fresh[0] else resolved.notices
            resolved = replace(resolved, model=as_fresh, notices=notices)
        runs.append(_begin(index, resolved, folder, stories[resolved.settings.mode], batch_size, processes))
    return runs


def _begin(
    index: int,
    resolved: ResolvedStory,
    folder: RunFolder | None,
    stories: int,
    batch_size: int | None,
    processes: int,
) -> StoryRun:
    model, story, settings = resolved.model, resolved.story, resolved.settings
    unit = mode_of(settings.mode).unit
    count = stories if unit == "story" else len(story.frames)
    size, reason = _micro_batch(model, settings, count, unit, batch_size, processes)
    notices = resolved.notices
    if folder is None or not folder.manifest:
        model, why = attending.measured(model, settings, size * rows_per_frame(model, settings))
        notices = (*notices, why) if why else notices
    sizes, threads = [size], model.placement.threads
    if folder is not None:
        if not folder.manifest:
            machine = {**model.placement.as_dict(), "versions": versions()}
            folder.begin(resolved.identity, story, resolved.sources, machine, size)
        sizes, threads = folder.batch_sizes(), folder.manifest["machine"]["threads"]
        if sizes[-1] != size:
            reason = f"{sizes[-1]} at once, as this run folder began"
    return StoryRun(
        model=model,
        story=story,
        settings=settings,
        prompts=resolved.prompts,
        index=index,
        folder=folder,
        sizes=tuple(sizes),
        reason=reason,
        threads=threads,
        notices=notices,
    )


def _micro_batch(
    model: Model, settings: Settings, count: int, unit: str, requested: int | None, processes: int
) -> tuple[int, str]:
    """How many of `count` are denoised at once, frames of a round or stories side by side, and why.

    Where nothing is requested, every process has a micro-batch to draw, and one that sees the pictures of those before it is
    of LATEST_AT_ONCE.
    """
    if requested is not None:
        size = min(requested, count)
        return size, f"{size} of {counted(count, unit)} at once, as asked for"
    factor = model.vae_factor
    width, height = (settings.width or 0) // factor, (settings.height or 0) // factor
    needed = frame_bytes(
        model.sizes.first_channels, model.placement.dtype, width, height, is_guided(model, settings)
    )
    taken = None if model.most_rows is None else max(1, model.most_rows // rows_per_frame(model, settings))
    if unit == "frame" and settings.references_from == "latest":
        # What a frame sees depends on it, and one process draws them all: no matter of memory or of processes.
        taken = min(LATEST_AT_ONCE, taken or LATEST_AT_ONCE)
    elif processes > 1:
        share = -(-count // processes)
        taken = share if taken is None else min(taken, share)
    size, reason = choose_batch(model.placement, needed, count, unit, taken)
    if model.idle_samplers and size < choose_batch(model.placement, 1, count, unit, taken)[0]:
        model.idle_samplers.clear()  # memory decides, and what the last story's sampler holds is no part of the question
        release_memory(model.placement.device)
        size, reason = choose_batch(model.placement, needed, count, unit, taken)
    return size, reason if processes == 1 else f"{reason}, {processes} processes"


def drawn_together(runs: Sequence[StoryRun], workers: int = 1) -> list[list[StoryRun]]:
    """Runs in the groups that are drawn side by side, in the order of the first of each group.

    With several workers a group is parted where its micro-batches are, at every frame: no story has other neighbours.
    """
    groups: dict[Hashable, list[StoryRun]] = {}
    for run in runs:
        groups.setdefault(run.batch_key, []).append(run)
    if workers == 1:
        return list(groups.values())
    return [
        group[first : first + step]
        for group in groups.values()
        for step in [math.lcm(*group[0].sizes)]
        for first in range(0, len(group), step)
    ]
