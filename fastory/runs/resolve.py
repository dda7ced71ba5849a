"""A story's settings resolved and checked against the model, before anything is locked or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fastory.conditioning.references import count_blocks
from fastory.errors import InputError
from fastory.models.protocol import Model
from fastory.modes.mode import mode_of
from fastory.modes.regions import NEEDED, no_masks, settled
from fastory.runs.identity import Identity
from fastory.runs.notices import unused_notices
from fastory.sampling.sampler import rows_per_frame
from fastory.sampling.schedulers import check_steps
from fastory.settings import MODES, Settings, check, resolve
from fastory.story import Story
from fastory.story.pronouns import understood

Frames = Sequence[int] | slice


@dataclass(frozen=True)
class ResolvedStory:
    """A story with all that decides its pictures.

    settings: with the size in pixels that is drawn; sources: where each of them came from. prompts: one a frame, as the
    text encoder gets them. regions: as asked for, before this story decided them. redrawn: the frames that alone are drawn
    anew, or None for a whole run. notices: for the user.
    """

    model: Model
    story: Story
    settings: Settings
    sources: Mapping[str, str]
    prompts: tuple[str, ...]
    regions: str
    redrawn: tuple[int, ...] | None
    notices: tuple[str, ...]

    def as_in_run(self, settings: Mapping[str, Any]) -> ResolvedStory:
        """The story in a run that has begun with these settings: what its captions decided of regions then holds.

        A redrawn caption may name a second character, or the last one no more; the run's other frames are as they are.
        """
        regions = settings.get("regions", "off")
        if self.regions == "off" or "off" not in (regions, self.settings.regions):
            return self
        return replace(self, settings=replace(self.settings, regions=regions))

    @cached_property
    def identity(self) -> Identity:
        """What a run folder of this story belongs to."""
        return Identity.of(self.story, self.settings, self.model.hashes, self.model.requested_dtype)


def resolve_story(
    model: Model,
    story: Story,
    flags: Mapping[str, Any],
    *,
    preset: str | None = None,
    whole: Settings | None = None,
    redrawn: Frames | None = None,
    batch_size: int | None = None,
) -> ResolvedStory:
    """Resolve a story's settings and check them against the model. Raises InputError for what it cannot draw.

    whole: settings that were given as one object, under the flags.
    """
    for name, value in story.settings.items():
        check(name, value, story.where(f"settings.{name}") or "story")
    named = {"style": story.style, "negative_prompt": story.negative_prompt}
    own = {**story.settings, **{name: value for name, value in named.items() if value is not None}}
    settings, sources = resolve(
        flags, own, preset, model.defaults, whole.said() if whole else None, model.distilled
    )
    width, height = model.native_size
    settings = replace(settings, width=settings.width or width, height=settings.height or height)
    story, understood_notices = _understood(story, settings)
    prompts = tuple(story.prompt(i, settings.style) for i in range(len(story.frames)))
    regions = settings.regions
    unmasked: tuple[str, ...] = ()
    if "regions" in MODES[settings.mode].own:
        unmasked = no_masks(model, story, settings, prompts)
        settings = replace(settings, regions=settled(model, story, settings, prompts))
    _check_drawable(model, story, settings, batch_size)
    check_steps(model, settings.scheduler, [n for n in (settings.steps, settings.inner_steps) if n])
    if settings.cache_interval > 1:
        model.deep_features()  # InputError where there are none
    mode_of(settings.mode).check(model, story, settings)
    notices = (*understood_notices, *unmasked, *unused_notices(model, story, settings, sources))
    if (regions, settings.regions) == ("on", "off") and not unmasked:
        notices += (f"`regions` are off in this story: {NEEDED}",)
    frames = frames_to_redraw(redrawn, story, settings)
    return ResolvedStory(model, story, settings, sources, prompts, regions, frames, notices)


def _understood(story: Story, settings: Settings) -> tuple[Story, tuple[str, ...]]:
    """The story with its pronouns understood where that is wanted, and a line that says how; none where there are none."""
    if settings.pronouns == "off" or not story.characters:
        return story, ()
    story, meant = story.understood()
    return story, (understood(meant),) if meant else ()


def frames_to_redraw(frames: Frames | None, story: Story, settings: Settings) -> tuple[int, ...] | None:
    """The frames' numbers. Raises InputError for an empty choice, and for one that the mode cannot redraw."""
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
    mode_of(settings.mode).check_redraw(wanted, story, settings)
    return wanted


def _check_drawable(model: Model, story: Story, settings: Settings, batch_size: int | None) -> None:
    """InputError for a size, references or a micro-batch that this model cannot draw."""
    groups = mode_of(settings.mode).reference_groups(story, settings)
    rows = (batch_size or 1) * rows_per_frame(model, settings)
    model.check_drawable(settings.width or 0, settings.height or 0, count_blocks(groups), len(groups), rows)
