"""Reference mode: the paradigm of fixed reference images, with which Story-Adapter (arXiv 2410.06244) compares itself.

x_i = D(c_i, z)                i < K     the bank: captions alone
R   = [proj(CLIPVision(x_j))]  j < K
x_i = D(c_i, z, R, l_1)        i >= K    every later frame from the same references, once

Pictures that are given are a bank of their own, and every frame is drawn from them.

It is round 0 of iterative mode for the bank, and a round 1 of the later frames alone, both of which count as one round.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image

from fastory.events import Event, FrameDrawn, RoundFinished, RoundStarted, StepDone
from fastory.models.protocol import Model
from fastory.modes.executor import Round
from fastory.modes.finished import Finished
from fastory.modes.iterative import IterativeRun, draw_batches
from fastory.modes.memory import until_it_fits
from fastory.modes.mode import StoryPlan, check_bank, long_captions, not_read, register
from fastory.pictures import Picture, open_picture
from fastory.runtime import fewest_rows
from fastory.sampling.sampler import leave_idle
from fastory.settings import MODES, Settings
from fastory.story import Story
from fastory.wording import counted


def reference(
    model: Model, plan: StoryPlan, *, batch_sizes: Sequence[int], size: tuple[int, int]
) -> Iterator[Event]:
    """Draw the bank, then the other frames from its pictures; yields events, among them every picture.

    batch_sizes, size: as for iterative().
    """
    yield from long_captions(model, plan)
    pictures, finished = plan.story.initial_pictures, plan.finished
    bank = len(pictures) or min(plan.settings.bank_size, len(plan.story.frames))
    settings = replace(plan.settings.with_own_alone(), iterations=1, regions="off", bank=bank)
    plan = replace(plan, settings=settings, finished=Given(pictures) if pictures else finished)
    run = IterativeRun.of(model, plan, batch_sizes, size, characters={})
    try:
        for event in until_it_fits(run, partial(draw_once, run, finished), 0):
            if isinstance(event, StepDone) or isinstance(event, FrameDrawn):  # noqa: SIM101  # mypy narrows these apart
                event = replace(event, round=0, story_index=plan.index)
            yield event
    finally:
        leave_idle(run.sampler)


@dataclass(frozen=True)
class Given:
    """The bank as pictures that were given (`Finished`)."""

    pictures: Sequence[Picture]

    def has(self, round: int, frame: int) -> bool:
        """True for one of the bank."""
        return frame < len(self.pictures)

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        """The picture, whole."""
        return open_picture(self.pictures[frame]), None


def draw_once(run: IterativeRun, finished: Finished, size: int) -> Generator[Event, None, None]:
    """All frames that are not finished, `size` at a time, those of the bank first; a bank that is given is not drawn."""
    settings, started, count = run.settings, time.monotonic(), len(run.story.frames)
    missing = frozenset(i for i in range(count) if not finished.has(0, i))
    first = 0 if run.story.initial_pictures else settings.bank_size
    bank, later = range(first), range(first, count)
    if not missing:
        return
    run.drawn.begin(0)
    yield RoundStarted(0, 0, settings.reference_scale_of(1), len(missing), settings.steps)
    for k, frames in enumerate((bank, later)):
        if todo := missing.intersection(frames):
            # as many at once as leave the fewest rows empty
            at_once = fewest_rows(len(frames), min(size, len(frames)))
            round = Round(k, at_once, frames.stop, todo, frames.start)
            yield from run.plan.executor.frames(run, round, partial(draw_batches, run, round))
    yield RoundFinished(0, 0, time.monotonic() - started)


class Reference:
    """The paradigm as a mode."""

    name = "reference"
    unit = "frame"

    def check(self, model: Model, story: Story, settings: Settings) -> None:
        """InputError where the model has no IP-Adapter."""
        if self.reference_groups(story, settings):
            model.require_references()

    def check_redraw(self, frames: Sequence[int], story: Story, settings: Settings) -> None:
        """InputError for a frame of the bank without the frames that were drawn from it; a given bank is no frame."""
        if not story.initial_pictures:
            check_bank(frames, story, settings.bank_size)

    def reference_groups(self, story: Story, settings: Settings) -> list[int]:
        """The bank, where there are frames beside it."""
        if story.initial_pictures:
            return [len(story.initial_pictures)]
        return [settings.bank_size] if settings.bank_size < len(story.frames) else []

    def unused(self, story: Story, settings: Settings) -> dict[str, str]:
        """Settings of references where every frame is in the bank."""
        if story.initial_pictures:
            return {"bank": "pictures are given in its place"}
        if self.reference_groups(story, settings):
            return {}
        why = f"the bank of {settings.bank_size} holds every frame, and none sees another"
        return dict.fromkeys(MODES[self.name].own, why)

    def notices(self, model: Model, story: Story, settings: Settings) -> Iterator[str]:
        """What of the story is not read."""
        yield from not_read(story, self.name, "the first frames, or pictures that are given")

    def group(self, story: Story, settings: Settings) -> None:
        """Every story is drawn alone: its frames fill the micro-batches."""

    def draw(
        self, model: Model, plans: Sequence[StoryPlan], *, batch_sizes: Sequence[int], size: tuple[int, int]
    ) -> Iterator[Event]:
        """The one story."""
        (plan,) = plans
        return reference(model, plan, batch_sizes=batch_sizes, size=size)

    def method(self, settings: Settings) -> dict[str, str]:
        """The bank and its weight."""
        bank = counted(settings.bank_size, "first frame")
        return {"References": f"{bank}, scale {settings.reference_scale[0]:g}"}

    def picture_values(self, settings: Settings, round: int) -> dict[str, Any]:
        """The bank and its weight."""
        return {"bank": settings.bank_size, "reference_scale": settings.reference_scale[0]}


register(Reference(), MODES["reference"])
