"""Consistent mode: StoryDiffusion (arXiv 2405.01434, section 3.1), whose frames see each other while they are denoised.

In place of self-attention stands Consistent Self-Attention, in every layer and at every step: see
fastory.processors.consistent. The first K frames, the bank, are denoised together and see each other; every later frame sees
the bank. A UNet call holds the bank and a window of m later frames, which slides over the story: its memory does not grow
with the story's length, and a later frame depends on its own caption and noise and on the bank's alone.

The bank's tokens of all steps and layers are not kept, which would take gigabytes: the bank is denoised again beside
every window, to the same latents. A story of N frames takes ceil((N - K) / m) times the steps, in UNet calls of K + m frames.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastory.conditioning.consistent import ConsistentContext, FrameSamples
from fastory.conditioning.references import References
from fastory.errors import InputError
from fastory.events import Event, FrameDrawn, RoundFinished, RoundStarted, StepDone
from fastory.models.protocol import Model
from fastory.modes.iterative import IterativeRun, references_of, report_steps, row_of
from fastory.modes.memory import until_it_fits
from fastory.modes.mode import StoryPlan, check_bank, long_captions, not_read, register
from fastory.runtime import fewest_rows
from fastory.sampling.sampler import Row, Sampler, leave_idle
from fastory.settings import MODES, Settings
from fastory.story import Story
from fastory.wording import counted


def consistent(
    model: Model, plan: StoryPlan, *, batch_sizes: Sequence[int], size: tuple[int, int]
) -> Iterator[Event]:
    """Draw a story whose frames see each other (StoryDiffusion); yields events, among them every picture.

    batch_sizes: frames of a UNet call, the bank among them, and one more than the bank at least. size: as for iterative().
    """
    yield from long_captions(model, plan)
    settings = replace(plan.settings.with_own_alone(), iterations=0, regions="off")
    settings = replace(settings, bank=min(settings.bank_size, len(plan.story.frames)))
    run = IterativeRun.of(model, replace(plan, settings=settings), batch_sizes, size, characters={})
    try:
        yield from until_it_fits(run, partial(draw_once, run), 0)
    finally:
        leave_idle(run.sampler)


def windows(frames: int, bank: int, size: int) -> list[range]:
    """The later frames in windows of which each stands beside the bank in UNet calls of `size` frames, or bank + 1."""
    later = frames - bank
    if not later:
        return [range(bank, bank)]  # the bank alone
    at_once = fewest_rows(later, min(later, max(1, size - bank)))
    return [range(first, min(first + at_once, frames)) for first in range(bank, frames, at_once)]


def draw_once(run: IterativeRun, size: int) -> Generator[Event, None, None]:
    """All frames that are not finished, window after window."""
    started, count = time.monotonic(), len(run.story.frames)
    missing = {i for i in range(count) if not run.plan.finished.has(0, i)}
    if not missing:
        return
    yield RoundStarted(0, 0, 0.0, len(missing), run.settings.steps)
    bank, at_hand = run.settings.bank_size, windows(count, run.settings.bank_size, size)
    for window in at_hand:
        # The bank is drawn in the first window that is.
        todo = missing.intersection((*range(bank), *window))
        if not todo.isdisjoint(window) or (window == at_hand[-1] and todo):
            yield from draw_window(run, bank + len(at_hand[0]), window, todo)
            missing -= todo
    yield RoundFinished(0, 0, time.monotonic() - started)


def draw_window(run: IterativeRun, frames: int, window: range, todo: set[int]) -> Iterator[Event]:
    """Denoise the bank and a window of later frames in UNet calls of `frames` frames; those in `todo` are pictures then."""
    text = references_of(run, 0, {})
    rows = [row_of(run, text, 0, i) for i in (*range(run.settings.bank_size), *window)]
    sampler = run.sampler_of(frames)
    sampler.set_steps(run.settings.steps)
    samples = samples_of(run, sampler, text, rows)
    sampler.set_round(samples)
    context = sampler.context
    assert isinstance(context, ConsistentContext)
    for event in report_steps(sampler, rows, 0, todo, lambda call: context.write(samples.calls[call])):
        yield replace(event, story_index=run.plan.index) if isinstance(event, StepDone) else event
    for n, row in enumerate(rows):
        if row.frame in todo:
            decoded = run.model.decode(sampler.latents[n : n + 1])
            picture, why = decoded.image, decoded.left_out
            yield FrameDrawn(0, row.frame, picture, row.seed, why, story_index=run.plan.index)


def samples_of(run: IterativeRun, sampler: Sampler, text: References, rows: Sequence[Row]) -> FrameSamples:
    """The tokens that every row sees at every UNet call; a row that fills up the call sees those of the last one."""
    _, height, width = sampler.latent_shape
    levels = run.model.self_attention_levels()
    padded = [*rows, *[rows[-1]] * (sampler.batch_size - len(rows))]
    return FrameSamples.of(
        text,
        [(row.frame, row.seed) for row in padded],
        run.settings.bank_size,
        tokens=[-(-height // 2**level) * -(-width // 2**level) for level in levels],
        rate=run.settings.sampling_rate,
        calls=len(sampler.host_timesteps),
        device=run.model.placement.device,
    )


class Consistent:
    """StoryDiffusion as a mode."""

    name = "consistent"
    unit = "frame"

    def check(self, model: Model, story: Story, settings: Settings) -> None:
        """InputError where frames cannot see each other in the model's self-attention."""
        model.self_attention_levels()

    def check_redraw(self, frames: Sequence[int], story: Story, settings: Settings) -> None:
        """InputError for a frame of the bank without all others: the bank is drawn together, and all see it."""
        check_bank(frames, story, settings.bank_size)
        bank = range(min(settings.bank_size, len(story.frames)))
        if frames[0] < len(bank) and not set(bank) <= set(frames):
            raise InputError(
                f"--frames: the first {counted(len(bank), 'frame')} see each other while they are drawn; wanted all of them "
                "and those that see them (0-), or later ones alone"
            )

    def reference_groups(self, story: Story, settings: Settings) -> list[int]:
        """None: frames see each other in self-attention."""
        return []

    def unused(self, story: Story, settings: Settings) -> dict[str, str]:
        """What a story of one frame has no use for."""
        if len(story.frames) > 1:
            return {}
        return dict.fromkeys(MODES[self.name].own, "the story has one frame, which sees no other")

    def notices(self, model: Model, story: Story, settings: Settings) -> Iterator[str]:
        """What of the story is not read."""
        yield from not_read(story, self.name, "the frames that are denoised together")

    def group(self, story: Story, settings: Settings) -> None:
        """Every story is drawn alone: its frames fill the micro-batches."""

    def draw(
        self, model: Model, plans: Sequence[StoryPlan], *, batch_sizes: Sequence[int], size: tuple[int, int]
    ) -> Iterator[Event]:
        """The one story."""
        (plan,) = plans
        return consistent(model, plan, batch_sizes=batch_sizes, size=size)

    def method(self, settings: Settings) -> dict[str, str]:
        """The bank, and how much of it is seen."""
        bank = counted(settings.bank_size, "first frame")
        return {"Self-attention": f"sees {bank}, {settings.sampling_rate:g} of their tokens"}

    def picture_values(self, settings: Settings, round: int) -> dict[str, Any]:
        """The bank, and how much of it is seen."""
        return {"bank": settings.bank_size, "sampling_rate": settings.sampling_rate}


register(Consistent(), MODES["consistent"])
