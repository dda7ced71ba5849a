"""Iterative mode: Story-Adapter (arXiv 2410.06244), section 1 of the algorithms.

x_i^0 = D(c_i, z)                                     round 0: captions alone
R     = [proj(CLIPVision(x_j^{k-1}))] over frames j   references of round k
x_i^k = D(c_i, z, R, l_k)                             rounds k = 1 .. K, every frame i on its own

With references from the latest round, x_j^k stands in R in place of x_j^{k-1} where frame j's micro-batch came before: the
iteration of Gauss and Seidel in place of Jacobi's. A frame then depends on the size of the micro-batches, which a run keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fastory.conditioning.references import Group, References, everywhere
from fastory.errors import InputError
from fastory.events import Compiling, Event, FrameDrawn, RoundFinished, RoundStarted, StepDone
from fastory.models.protocol import Caption, Model
from fastory.modes.converged import staying
from fastory.modes.described import rounds_described, values_described
from fastory.modes.drawn_rounds import LOOKED_BACK, DrawnFrame, DrawnRounds
from fastory.modes.executor import HERE, Batch, Round
from fastory.modes.initial import check_initial, initial_round
from fastory.modes.memory import until_it_fits
from fastory.modes.mode import StoryPlan, long_captions, register
from fastory.modes.regions import NEEDED, Regions, Seen, check_findable, check_layout, named, settled
from fastory.modes.weighting import ramped, weights_of
from fastory.pictures import open_picture
from fastory.sampling.noise import frame_seed
from fastory.sampling.sampler import Row, Sampler, leave_idle, sampler_for
from fastory.sampling.tail import Tail
from fastory.settings import MODES, SCHEDULERS, Settings
from fastory.story import Story


@dataclass
class IterativeRun:
    """One story being drawn: what stays the same over its rounds, and the micro-batch, which may shrink."""

    model: Model
    plan: StoryPlan
    batch_sizes: Sequence[int]
    size: tuple[int, int]
    negative: Caption
    negative_kv: Tensor
    captions: list[Caption]
    characters: dict[str, list[Tensor]]
    drawn: DrawnRounds
    regions: Regions | None = None
    halved: int | None = None
    sampler: Sampler | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        plan: StoryPlan,
        batch_sizes: Sequence[int],
        size: tuple[int, int] | None = None,
        characters: dict[str, list[Tensor]] | None = None,
    ) -> IterativeRun:
        """Encode what stays the same: captions and characters' pictures. size: as for iterative().

        characters: the tokens of their pictures, where another process has encoded them.
        """
        settings = plan.settings
        if size is None:
            width, height = model.native_size
            size = settings.width or width, settings.height or height
        negative = model.encode_negative(settings.negative_prompt)
        negative_kv = project(model, negative)
        captions = [model.encode_caption(prompt) for prompt in plan.prompts]
        characters = encode_characters(model, plan) if characters is None else characters
        regions = None
        if settled(model, plan.story, settings, plan.prompts) != "off":
            regions = Regions(model, plan.story, settings, plan.prompts, captions, size)
        drawn = DrawnRounds(model, settings, plan.finished, regions)
        return cls(
            model, plan, batch_sizes, size, negative, negative_kv, captions, characters, drawn, regions
        )

    @property
    def settings(self) -> Settings:
        """The story's."""
        return self.plan.settings

    @property
    def story(self) -> Story:
        """What is drawn."""
        return self.plan.story

    def sampler_of(self, size: int) -> Sampler:
        """The sampler for micro-batches of `size`; its buffers and captured graphs serve all rounds."""
        if self.sampler is None or self.sampler.batch_size != size:
            self.sampler = None  # its buffers go before the new ones come
            self.sampler = sampler_for(self.model, self.settings, size, *self.size)
        return self.sampler

    @cached_property
    def null_reference(self) -> Tensor:
        """The unconditional reference's tokens (1, T, C_x), once a story."""
        return self.model.null_reference()


def iterative(
    model: Model, plan: StoryPlan, *, batch_sizes: Sequence[int], size: tuple[int, int] | None = None
) -> Iterator[Event]:
    """Draw a story round by round (Story-Adapter, section 3); yields events, among them every picture.

    batch_sizes: frames at once in round 0, 1, ..; the last entry stands for all later rounds. size: of the pictures,
    (width, height) in pixels; None is the settings', and where they have none the model's. `plan.finished` is asked again
    after a BatchHalved, whose round starts anew.
    """
    yield from long_captions(model, plan)
    run = IterativeRun.of(model, plan, batch_sizes, size)
    try:
        for k in range(plan.settings.iterations + 1):
            yield from until_it_fits(run, partial(draw_round, run, k), k)
    finally:
        leave_idle(run.sampler)


def encode_characters(model: Model, plan: StoryPlan) -> dict[str, list[Tensor]]:
    """The tokens of every character's pictures, once a story; none where no round sees them."""
    shown = plan.settings.reference_start <= plan.settings.iterations
    return {
        character.name: [
            model.encode_reference(open_picture(picture), plan.settings.reference_fit)
            for picture in (character.references if shown else ())
        ]
        for character in plan.story.characters
    }


def draw_round(run: IterativeRun, k: int, size: int) -> Generator[Event, None, None]:
    """All frames of round k that are not finished, `size` at a time."""
    settings, started = run.settings, time.monotonic()
    count = len(run.story.frames)
    todo = frozenset(i for i in range(count) if not run.plan.finished.has(k, i))
    run.drawn.begin(k)
    stays = staying(run.drawn, settings, first_settled(run), k, count)
    if not todo:
        return
    scale, steps = settings.reference_scale_of(k), settings.steps_of(k)
    yield RoundStarted(k, settings.iterations, scale, len(todo), steps)
    for i in stays:
        run.drawn.put(k, i, run.drawn.seen(k - 1, i))
        if i in todo:
            image, seed = run.drawn.picture(k - 1, i), seed_of(run, stays[i], i)
            run.drawn.keep(k, i, image)
            yield FrameDrawn(k, i, image, seed, None, converged=stays[i])
    if k == 0 and run.story.initial_pictures:
        yield from initial_round(run, todo)
        todo = frozenset()
    round = Round(k, size, count, todo - stays.keys(), staying=frozenset(stays))
    # With references from the latest round a micro-batch waits for the one before it, wherever that is drawn.
    executor = HERE if settings.references_from == "latest" else run.plan.executor
    for event in executor.frames(run, round, partial(draw_batches, run, round)):
        if isinstance(event, FrameDrawn):
            run.drawn.keep(k, event.frame, event.image)
        yield event
    yield RoundFinished(k, settings.iterations, time.monotonic() - started)


def first_settled(run: IterativeRun) -> int:
    """The first round with no fewer references than the later ones have, but for the frames' own."""
    return max(0, run.settings.reference_start - 1) if has_pictures(run.story) else 0


def draw_batches(run: IterativeRun, round: Round, batches: Iterable[Batch]) -> Iterator[Event]:
    """Some of a round's micro-batches, in this process."""
    settings, k = run.settings, round.number
    sampler = run.sampler_of(round.size)
    sampler.set_steps(settings.scheduled_steps(k), settings.steps_of(k))
    latest = settings.references_from == "latest"
    references: References | None = None
    with Tail[DrawnFrame](run.model.placement.device) as tail:
        for members in batches:
            if references is None or latest:
                yield from run.drawn.take(k, tail.rest())
                fresh = {j: run.drawn.as_reference(k, j) for j in range(members[0] if latest else 0)}
                references = references_of(run, k, fresh)
                sampler.set_round(references)
            rows = [row_of(run, references, k, i) for i in members]
            prepare = ramped(sampler, references, settings)
            for event in report_steps(sampler, rows, k, round.missing, prepare):
                yield event
                yield from run.drawn.take(k, tail.ready())
            yield from run.drawn.take(k, tail.rest())  # the micro-batch before this one
            for n, row in enumerate(rows):
                if row.frame in round.missing:
                    tail.submit(partial(run.drawn.finish, k, row.frame, row.seed), sampler.latents[n : n + 1])
                    yield from run.drawn.take(k, tail.ready())
        yield from run.drawn.take(k, tail.rest())


def report_steps(
    sampler: Sampler,
    rows: Sequence[Row],
    k: int,
    todo: Container[int],
    prepare: Callable[[int], object] | None = None,
) -> Iterator[Compiling | StepDone]:
    """Denoise a micro-batch, with an event a step that names the frames it is for. prepare: as of Sampler.denoise."""
    frames = tuple(row.frame for row in rows if row.frame in todo)
    yield from (Compiling(*done) for done in sampler.compile())
    for step, seconds in sampler.denoise(rows, prepare):
        yield StepDone(k, frames, step, sampler.steps, seconds)


def groups_of(run: IterativeRun, k: int, fresh: Mapping[int, Seen]) -> list[Group]:
    """The references of round k: the story's frames as one group, then a group for each character's pictures.

    fresh: pictures that are seen in place of the last round's of their frames. With regions a character's appearances are a
    group, too, and what it has the story's group has not.
    """
    settings, story, regions = run.settings, run.story, run.regions
    groups: list[Group] = []
    count = settings.bank_size or len(story.frames)
    frames = range(count) if k else fresh.keys()
    seen = {j: fresh[j] if j in fresh else run.drawn.as_reference(k - 1, j) for j in frames}
    if seen:
        tokens = [seen[j].whole if j in seen else None for j in range(count)]
        rest = everywhere if regions is None else partial(regions.rest, last=seen)
        sees = frames_seen(story, settings.references)
        weights = weights_of(tokens, settings)
        groups.append(Group(tokens, settings.reference_scale_of(k), sees, rest, weights))
        groups += [] if regions is None else regions.groups(k, seen)
    for character in story.characters:
        if run.characters[character.name] and k >= settings.reference_start:
            scale = settings.reference_scale_of(max(k, 1)) if character.scale is None else character.scale
            mask = everywhere if regions is None else regions.mask_of(character.name, seen)
            groups.append(Group(run.characters[character.name], scale, in_cast(story, character.name), mask))
    return groups


def frames_seen(story: Story, references: str) -> Callable[[int, int], bool]:
    """Which frames of the last round a frame sees.

    all: every one (the paper); others: not its own; cast: others that share a named character with it.
    """
    if references == "all":
        return lambda i, j: True
    casts = [story.cast(i) for i in range(len(story.frames))]
    if references == "others":
        return lambda i, j: i != j
    return lambda i, j: i != j and (not casts[i] or bool(casts[i] & casts[j]))


def in_cast(story: Story, name: str) -> Callable[[int, int], bool]:
    """A character's pictures are seen by the frames that it is in."""
    return lambda i, n: name in story.cast(i)


@torch.inference_mode()
def references_of(run: IterativeRun, k: int, fresh: Mapping[int, Seen]) -> References:
    """What the rows of round k read, each group ending with its null block. fresh: as for groups_of."""
    return References.of(
        groups_of(run, k, fresh),
        lambda: run.null_reference,
        run.model.layers.project_references,
        tokens_per_ref=run.model.tokens_per_ref,
        like=run.negative_kv,
        grid=None if run.regions is None else run.regions.grid,
        words=None if run.regions is None else run.regions.words,
        value_columns=run.model.layers.value_columns,
    )


def row_of(run: IterativeRun, references: References, k: int, frame: int) -> Row:
    """One frame's inputs in round k: the seed of its noise, what it begins from, its text K/V and which references it sees."""
    caption, text_bias, self_bias = run.captions[frame], None, None
    if run.regions is not None:
        text_bias = run.regions.text_bias(frame, references.text_tokens)
        self_bias = run.regions.self_bias(frame)
    return Row(
        frame=frame,
        seed=seed_of(run, k, frame),
        caption=caption,
        negative=run.negative,
        conditional=references.row(frame, project(run.model, caption), text_bias, self_bias),
        unconditional=references.null_row(frame, run.negative_kv, self_bias),
        start=run.drawn.seen(k - 1, frame).latents if run.settings.restarts(k) else None,
    )


def seed_of(run: IterativeRun, k: int, frame: int) -> int:
    """The seed of a frame's noise in round k."""
    plan = run.plan
    return frame_seed(plan.story.frames[frame].seed, plan.seeds.get(frame), plan.settings, frame, k)


def prepare_round(
    model: Model, plan: StoryPlan, k: int, batch_size: int, size: tuple[int, int] | None = None
) -> tuple[Sampler, list[Row]]:
    """Round k ready to be denoised step by step, for measurements: the sampler, and a row for every frame of the story.

    Its references are plan.finished's pictures of round k - 1. batch_size: frames at once. size: as for iterative().
    """
    run = IterativeRun.of(model, plan, [batch_size], size)
    references, sampler = references_of(run, k, {}), run.sampler_of(batch_size)
    sampler.set_steps(plan.settings.scheduled_steps(k), plan.settings.steps_of(k))
    sampler.set_round(references)
    return sampler, [row_of(run, references, k, i) for i in range(len(plan.story.frames))]


@torch.inference_mode()
def project(model: Model, caption: Caption) -> Tensor:
    """Text K/V (1, Lt, W) of a caption."""
    return model.layers.project_text(caption.tokens)


class Iterative:
    """Story-Adapter as a mode."""

    name = "iterative"
    unit = "frame"

    def check(self, model: Model, story: Story, settings: Settings) -> None:
        """InputError where references are needed and the model has no IP-Adapter."""
        check_initial(story, settings)
        check_layout(story, (settings.width or 0, settings.height or 0))
        shown = has_pictures(story) and settings.reference_start <= settings.iterations
        if settings.iterations >= settings.first_referring or shown:
            model.require_references()
        if settings.restarts(settings.iterations):
            check_restart(model, settings)
        check_findable(model, story, settings)
        if settings.reference_weighting == "majority" and model.layers.value_columns is None:
            raise InputError(
                f"reference_weighting: wanted equal for {model.name}: it was exported when exports did not say which columns "
                "are values; export it anew"
            )

    def check_redraw(self, frames: Sequence[int], story: Story, settings: Settings) -> None:
        """Any frames can be redrawn: the last round alone is, from the same references."""

    def reference_groups(self, story: Story, settings: Settings) -> list[int]:
        """All frames of the last round, and every character's pictures."""
        shown = settings.reference_start <= settings.iterations
        pictures = [
            len(character.references) for character in story.characters if character.references and shown
        ]
        if settings.iterations < settings.first_referring:
            return pictures
        own = [len(story.frames)] * (0 if settings.regions == "off" else len(named(story, settings)))
        return [len(story.frames), *own, *pictures]

    def unused(self, story: Story, settings: Settings) -> dict[str, str]:
        """Settings of references where there are none."""
        reasons: dict[str, str] = {}
        pictures = has_pictures(story)
        if settings.until != "converged":
            reasons["tolerance"] = (
                "a frame that no longer changes is finished early with `until: converged` alone"
            )
        elif settings.iterations <= LOOKED_BACK - 1:
            why = f"whether a frame still changes is known after round {LOOKED_BACK - 1}, and there is none after it"
            reasons |= dict.fromkeys(("until", "tolerance"), why)
        if settings.iterations < 2:
            reasons["restart"] = "rounds begin from pictures from round 2 on, and there is no such round"
        if settings.iterations <= settings.first_referring:
            reasons["reference_momentum"] = "no round sees a frame that was drawn more than once"
        if not settings.iterations:
            reasons["inner_steps"] = "without iterations there is one round, the last"
        if settings.iterations < settings.first_referring:
            no_frames = "without iterations no frame sees another one"
            reasons |= dict.fromkeys(("references", "reference_saturation"), no_frames)
            if not pictures or settings.reference_start > 0:
                why = "without iterations nothing is a reference"
                reasons |= dict.fromkeys(
                    (
                        *("reference_scale", "reference_fit", "reference_interval", "reference_rise"),
                        *("reference_weighting", "reference_ramp"),
                    ),
                    why,
                )
        if settings.regions == "off":
            reasons["cast_limit"] = "without regions no character has references of its own"
        if not pictures:
            reasons["reference_start"] = "the story gives no pictures of its characters"
        return reasons

    def notices(self, model: Model, story: Story, settings: Settings) -> Iterator[str]:
        """What of the story is not read, and that there are no iterations."""
        for character in story.characters:
            if character.scale is not None and not character.references:
                yield f"`scale` of {character.name} is not used: it is the weight of pictures, and none are given"
            if character.references and settings.reference_start > settings.iterations:
                yield (
                    f"the pictures of {character.name} are not used: they count from round {settings.reference_start} on "
                    f"(reference_start), and the last round is {settings.iterations}"
                )
        if settings.regions == "off" and any(frame.is_laid_out for frame in story.frames):
            yield f"`boxes` and `masks` are not used: regions are off; {NEEDED}"
        if settings.iterations < settings.first_referring:
            yield "0 iterations: every frame is drawn from its caption alone"
        if story.first_frame is not None:
            yield "`first_frame` is read by causal mode alone; this story is drawn without it"

    def group(self, story: Story, settings: Settings) -> None:
        """Every story is drawn alone: its frames fill the micro-batches."""

    def draw(
        self, model: Model, plans: Sequence[StoryPlan], *, batch_sizes: Sequence[int], size: tuple[int, int]
    ) -> Iterator[Event]:
        """The one story; events say its index."""
        (plan,) = plans
        for event in iterative(model, plan, batch_sizes=batch_sizes, size=size):
            if isinstance(event, StepDone) or isinstance(event, FrameDrawn):  # noqa: SIM101  # mypy narrows these apart
                event = replace(event, story_index=plan.index)
            yield event

    def method(self, settings: Settings) -> dict[str, str]:
        """Rounds and references."""
        return {"Rounds": rounds_described(settings)}

    def picture_values(self, settings: Settings, round: int) -> dict[str, Any]:
        """The weight of the references in this round, and which frames they were."""
        return values_described(settings, round)


def check_restart(model: Model, settings: Settings) -> None:
    """InputError where rounds cannot begin from pictures: they are encoded by the VAE, and noised by the scheduler."""
    if not model.takes_masks:
        raise InputError(
            f"restart: wanted 1 for {model.name}: it was exported without an encoder for the pictures that rounds would begin "
            "from; export it with --characters 1 or more"
        )
    if not SCHEDULERS[settings.scheduler].begins_within:
        able = ", ".join(name for name, row in SCHEDULERS.items() if row.begins_within)
        raise InputError(
            f"restart: scheduler {settings.scheduler} begins with steps of its own; wanted one of {able}, or restart 1"
        )


def has_pictures(story: Story) -> bool:
    """Whether pictures of a character are given."""
    return any(character.references for character in story.characters)


register(Iterative(), MODES["iterative"])
