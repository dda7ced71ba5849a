"""Causal mode: AR-LDM (WACV 2024) with the local window of Causal-Story (ICASSP 2024); section 2 of the algorithms.

x_t = D(c_t, z_t, [CLIP(c_t) ; h_{t-L} .. h_{t-1}])     frame after frame, from its caption and the last L_M frames
h_t = history(c_t, x_t)                                 encoded once, then in the ring until L_M frames came after it

A caption leaves open what its characters look like, and a UNet may begin a story with a picture between two looks, which
every later frame would take for another one of them. With drafts, frame 0 is drawn, taken into the history alone, and drawn
again from it, with the same noise: what the history makes of it is what it will make of it later.

Frames of one story wait for each other, so several stories are drawn side by side, one frame of each at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastory.checkpoints.history_encoder import HistoryConfig
from fastory.conditioning.history import EncodedFrame, HistoryRow, Ring, Window
from fastory.errors import InputError
from fastory.events import Compiling, Event, FrameDrawn, StepDone
from fastory.models.protocol import Caption, Model, UnetInputs
from fastory.modes.laid_out import LaidOut, looked_for_at
from fastory.modes.memory import until_it_fits
from fastory.modes.mode import StoryPlan, long_captions, register
from fastory.modes.regions import beside, changes, check_findable, check_layout
from fastory.pictures import open_picture
from fastory.sampling.noise import frame_seed
from fastory.sampling.sampler import Row, Sampler, leave_idle, sampler_for
from fastory.settings import MODES, Settings
from fastory.story import Story
from fastory.wording import counted


@dataclass
class StoryState:
    """One of the stories that are drawn side by side. ring holds the history of its first `frames_done` frames.

    laid_out: where its characters are, None where no frame says it and nobody looks for them.
    """

    plan: StoryPlan
    laid_out: LaidOut | None = None
    ring: Ring | None = None
    frames_done: int = 0

    def needs(self, frame: int) -> bool:
        """Whether `frame` is to be drawn."""
        return frame < len(self.plan.prompts) and not self.plan.finished.has(0, frame)


def window_of(config: HistoryConfig, settings: Settings, frames: int) -> int:
    """L_M in frames for a story: as set; `all` is as many as come before the last frame, at least 1.

    Raises InputError where the encoder has no time embedding for so many.
    """
    wanted = max(1, frames - 1) if settings.window == "all" else int(settings.window)
    if wanted > config.positions:
        what = (
            f"window all, and the story's {counted(frames, 'frame')} need {wanted}"
            if settings.window == "all"
            else f"window {settings.window}"
        )
        raise InputError(
            f"{what}: this model has time embeddings for {counted(config.positions, 'frame')} of history; "
            f"give --window {config.positions} or less"
        )
    return wanted


def places_anybody(story: Story, settings: Settings) -> bool:
    """Whether characters of a story keep to places: its boxes and masks, or those where they are found (`regions`)."""
    return settings.regions != "off" or any(frame.is_laid_out for frame in story.frames)


class CausalBatch:
    """Stories drawn side by side with one model, window and sampler."""

    def __init__(
        self,
        model: Model,
        plans: Sequence[StoryPlan],
        batch_sizes: Sequence[int],
        size: tuple[int, int],
    ) -> None:
        """batch_sizes: stories at once at frame 0, 1, ..; size: of the pictures, (width, height) in pixels."""
        self.history = model.require_history()
        self.model, self.size = model.causal, size
        self.states = [StoryState(plan, self.laid_out(plan)) for plan in plans]
        self.batch_sizes = batch_sizes
        self.halved: int | None = None
        self.settings = plans[0].settings
        frames = max(len(plan.prompts) for plan in plans)
        self.window = window_of(self.history.encoder.config, self.settings, frames)
        self.sampler: Sampler | None = None
        self.negatives: dict[str, tuple[Caption, Tensor, Tensor]] = {}

    def laid_out(self, plan: StoryPlan) -> LaidOut | None:
        """Where a story's characters are; exported graphs have no inputs for it."""
        if not self.model.takes_biases or not places_anybody(plan.story, plan.settings):
            return None
        return LaidOut(self.model, self.history, plan.story, plan.prompts, self.size, plan.settings)

    def sampler_of(self, size: int) -> Sampler:
        """The sampler for `size` stories at once; its buffers and its captured graph serve all frames."""
        if self.sampler is None or self.sampler.batch_size != size:
            self.sampler = None  # its buffers go before the new ones come
            self.sampler = sampler_for(self.model, self.settings, size, *self.size)
            tokens = self.history.encoder.config.frame_tokens
            limit = int(self.model.tokenizer.model_max_length)
            grid = next((state.laid_out.grid for state in self.states if state.laid_out is not None), None)
            self.sampler.set_round(Window(limit, tokens, self.window, self.table, grid))
        return self.sampler

    @cached_property
    @torch.inference_mode()
    def table(self) -> Tensor:
        """K and V (P, W) of the window's positions, once a call."""
        return self.model.layers.project_text(self.history.encoder.positions()[None])[0]

    @cached_property
    @torch.inference_mode()
    def null(self) -> tuple[Tensor, Tensor]:
        """K and V (1, S, W) and padding of the unconditional frame, once a call."""
        alone = self.new_ring()
        alone.append(self.model.null_frame())
        return alone.kv[0], alone.padding[0]

    def new_ring(self) -> Ring:
        """An empty history."""
        return Ring(self.history.encoder, self.model.layers.project_text, self.table, self.window)

    @torch.inference_mode()
    def caption(self, prompt: str) -> tuple[Caption, Tensor, Tensor]:
        """A caption, its K and V (1, Lt, W) with type_0, and its padding (1, Lt)."""
        caption = self.model.encode_caption(prompt)
        kind = self.history.encoder.caption_type()
        return (
            caption,
            self.model.layers.project_text(caption.tokens + kind),
            self.model.caption_padding(prompt),
        )

    def negative(self, prompt: str) -> tuple[Caption, Tensor, Tensor]:
        """The unconditional caption, encoded and projected once a call."""
        if prompt not in self.negatives:
            self.negatives[prompt] = self.caption(prompt)
        return self.negatives[prompt]

    @torch.inference_mode()
    def append(self, state: StoryState, frame: int, picture: Image.Image | None) -> None:
        """Append a finished frame to the history, which frame 0 begins anew. None: left out, nobody sees its frame."""
        if frame == 0:
            state.ring = self.new_ring()
        encoded = self.model.encode_frame(state.plan.prompts[frame], picture or Image.new("RGB", self.size))
        if picture is None:
            encoded = EncodedFrame(encoded.tokens, torch.ones_like(encoded.padding))
        assert state.ring is not None
        state.ring.append(encoded)
        state.frames_done = frame + 1

    def catch_up(self, state: StoryState, frame: int) -> None:
        """The history before `frame`, from the finished pictures.

        Frame by frame, as it was made the first time, so that the bytes are the same. The newest L_M frames hold what
        the L_M - 1 before each of them said: 2 L_M - 1 frames are enough.
        """
        first = max(state.frames_done, frame - (2 * self.window - 1), 0)
        if state.ring is None or first > state.frames_done:
            state.ring = self.new_ring()
        for i in range(first, frame):
            picture, left_out = state.plan.finished.load(0, i)
            self.append(state, i, None if left_out else picture)

    @torch.inference_mode()
    def row(self, state: StoryState, frame: int) -> Row:
        """One frame's inputs: the seed of its noise, its caption, its history."""
        self.catch_up(state, frame)
        plan, settings = state.plan, state.plan.settings
        caption, caption_kv, caption_padding = self.caption(plan.prompts[frame])
        negative, negative_kv, negative_padding = self.negative(settings.negative_prompt)
        assert state.ring is not None
        kv, padding = state.ring.keys_values()
        null_kv, null_padding = state.ring.null_keys_values(*self.null)
        row = Row(
            frame=frame,
            seed=frame_seed(plan.story.frames[frame].seed, plan.seeds.get(frame), settings, frame),
            caption=caption,
            negative=negative,
            conditional=HistoryRow(torch.cat([caption_kv, kv], 1), torch.cat([caption_padding, padding], 1)),
            unconditional=HistoryRow(
                torch.cat([negative_kv, null_kv], 1), torch.cat([negative_padding, null_padding], 1)
            ),
        )
        if state.laid_out is not None:
            state.laid_out.forget(frame)  # who was found in an earlier picture of it
        return self.placed(state, frame, row)

    def placed(self, state: StoryState, frame: int, row: Row) -> Row:
        """A row whose characters keep to where they are now known to be."""
        if state.laid_out is None:
            return row
        assert state.ring is not None and isinstance(row.conditional, HistoryRow)
        assert isinstance(row.unconditional, HistoryRow)
        earlier = range(state.frames_done - len(state.ring.kv), state.frames_done)
        limit = int(self.model.tokenizer.model_max_length)
        bias = state.laid_out.bias(frame, limit, earlier, self.window)
        between = state.laid_out.between(frame)
        return replace(
            row,
            conditional=replace(row.conditional, bias=bias, self_bias=between),
            unconditional=replace(row.unconditional, self_bias=between),
        )

    def find(self, state: StoryState, frame: int, row: Row, latents: Tensor, timestep: Tensor) -> Row:
        """The row with the characters of its frame where they are about to appear; as it is where nobody is to be found.

        latents (1, c, h, w): of the frame as the UNet reads them at `timestep`. One call: a row reads the whole caption, and
        one a character the rest of it, each beside the same history. A map is how much the prediction changes (DiffEdit,
        arXiv 2210.11427).
        """
        laid_out = state.laid_out
        left_out = {} if laid_out is None else laid_out.captions_without(frame)
        if laid_out is None or not left_out:
            return row
        whole = row.conditional
        assert isinstance(whole, HistoryRow)
        tokens, limit = self.history.encoder.config.frame_tokens, int(self.model.tokenizer.model_max_length)
        read = [self.caption(prompt) for prompt in left_out.values()]
        context = Window(limit, tokens, self.window, self.table).context(1 + len(read))
        context.put(0, HistoryRow(whole.kv, whole.padding))
        for index, (_, kv, padding) in enumerate(read, 1):
            kv, padding = (
                torch.cat([own, history[:, limit:]], 1)
                for own, history in ((kv, whole.kv), (padding, whole.padding))
            )
            context.put(index, HistoryRow(kv, padding))
        captions = [row.caption, *(caption for caption, _, _ in read)]
        inputs = UnetInputs(
            latents.repeat(len(captions), 1, 1, 1),
            timestep,
            context,
            *beside(self.model, captions, state.plan.settings.guidance_scale, self.size),
        )
        laid_out.find(frame, changes(self.model, inputs, left_out))
        return self.placed(state, frame, row)


def causal(
    model: Model, plans: Sequence[StoryPlan], *, batch_sizes: Sequence[int], size: tuple[int, int]
) -> Iterator[Event]:
    """Draw stories side by side, frame after frame; yields events, among them every picture.

    All stories have the same sampling settings and window (those of the first one are used). batch_sizes: stories at
    once at frame 0, 1, ..; the last entry stands for all later frames. size: (width, height) in pixels. A story's
    first_frame is its frame 0 as it is (continuation); otherwise frame 0 is drawn from its caption (visualization).
    """
    batch = CausalBatch(model, plans, batch_sizes, size)
    for plan in plans:
        yield from long_captions(batch.model, plan)
    try:
        for frame in range(max(len(plan.prompts) for plan in plans)):
            if any(state.needs(frame) for state in batch.states):
                yield from until_it_fits(batch, partial(draw_frame, batch, frame), 0, frame)
    finally:
        leave_idle(batch.sampler)


def prepare_frame(
    model: Model, plans: Sequence[StoryPlan], frame: int, batch_size: int, size: tuple[int, int]
) -> tuple[Sampler, list[Row]]:
    """Frame `frame` ready to be denoised step by step, for measurements: the sampler, and a row for every story.

    The history is plan.finished's pictures of the frames before. batch_size: stories at once. size: as for causal().
    """
    batch = CausalBatch(model, plans, [batch_size], size)
    return batch.sampler_of(batch_size), [batch.row(state, frame) for state in batch.states]


def draw_frame(batch: CausalBatch, frame: int, size: int) -> Generator[Event, None, None]:
    """Frame `frame` of every story that lacks it, `size` stories at a time."""
    states = batch.states
    # A story always has the same place among the others, those that are finished included, as in iterative mode.
    for members in (states[first : first + size] for first in range(0, len(states), size)):
        todo = [state for state in members if state.needs(frame)]
        for state in [state for state in todo if frame == 0 and state.plan.story.first_frame is not None]:
            yield given_frame(batch, state)
            todo.remove(state)
        if not todo:
            continue
        sampler = batch.sampler_of(size)
        drafts = batch.settings.drafts if frame == 0 else 0
        for state in todo if drafts else ():  # memory may have run out behind a draft
            state.ring, state.frames_done = None, 0
        for draft in range(1, drafts + 1):
            yield from denoise(batch, sampler, members, todo, frame, draft)
            for n in positions(members, todo):
                decoded = batch.model.decode(sampler.latents[n : n + 1])
                batch.append(members[n], frame, None if decoded.left_out else decoded.image)
        rows = yield from denoise(batch, sampler, members, todo, frame)
        for n in positions(members, todo):
            yield finish_frame(batch, members[n], frame, rows[n], sampler.latents[n : n + 1])


def positions(members: Sequence[StoryState], todo: Sequence[StoryState]) -> list[int]:
    """Where in the micro-batch those are that are drawn."""
    return [n for n, state in enumerate(members) if state in todo]


def denoise(
    batch: CausalBatch,
    sampler: Sampler,
    members: Sequence[StoryState],
    todo: Sequence[StoryState],
    frame: int,
    draft: int = 0,
) -> Generator[Event, None, list[Row]]:
    """Denoise `frame` of all members, of which those in `todo` count; returns their rows. draft: as in StepDone.

    A member that is not drawn keeps its place by standing in for one that is.
    """
    drawn = {state.plan.index: batch.row(state, frame) for state in todo}
    stand_in = next(iter(drawn.values()))
    rows = [drawn.get(state.plan.index, stand_in) for state in members]
    yield from (Compiling(*done) for done in sampler.compile())
    calls = looked_for_at(len(sampler.host_timesteps))

    def find(number: int) -> None:
        """Between two steps: each story by itself, so that what it finds does not depend on those beside it."""
        for n in positions(members, todo) if number in calls else ():
            latents, timestep = sampler.read(n, number)
            found = batch.find(members[n], frame, rows[n], latents, timestep)
            if found is not rows[n]:
                sampler.put(n, found)

    for step, seconds in sampler.denoise(rows, find):
        for state in todo:
            yield StepDone(0, (frame,), step, sampler.settings.steps, seconds, state.plan.index, draft)
    return rows


def finish_frame(batch: CausalBatch, state: StoryState, frame: int, row: Row, latents: Tensor) -> FrameDrawn:
    """Decode a frame and take it into the history, where a later frame will see it."""
    decoded = batch.model.decode(latents)
    if frame + 1 < len(state.plan.prompts):
        batch.append(state, frame, None if decoded.left_out else decoded.image)
    return FrameDrawn(0, frame, decoded.image, row.seed, decoded.left_out, story_index=state.plan.index)


def given_frame(batch: CausalBatch, state: StoryState) -> FrameDrawn:
    """Frame 0 of a continuation: the given picture, cropped to the story's shape."""
    plan = state.plan
    assert plan.story.first_frame is not None
    picture = ImageOps.fit(open_picture(plan.story.first_frame), batch.size, Image.Resampling.LANCZOS)
    batch.append(state, 0, picture)
    return FrameDrawn(0, 0, picture, plan.settings.seed, None, story_index=plan.index)


class Causal:
    """AR-LDM with the window of Causal-Story as a mode."""

    name = "causal"
    unit = "story"

    def check(self, model: Model, story: Story, settings: Settings) -> None:
        """InputError where the model has no history encoder, or none for so wide a window, or a box fits no character."""
        check_layout(story, (settings.width or 0, settings.height or 0))
        check_findable(model, story, settings)
        window_of(model.require_history().encoder.config, settings, len(story.frames))

    def check_redraw(self, frames: Sequence[int], story: Story, settings: Settings) -> None:
        """InputError for frames that do not run to the end: every later frame depends on an earlier one."""
        if tuple(frames) != tuple(range(frames[0], max(len(story.frames), frames[-1] + 1))):
            raise InputError(
                f"--frames: in causal mode every later frame depends on an earlier one; wanted a first frame to redraw "
                f"from, such as {frames[0]}-"
            )

    def reference_groups(self, story: Story, settings: Settings) -> list[int]:
        """None: the history takes their place."""
        return []

    def unused(self, story: Story, settings: Settings) -> dict[str, str]:
        """Drafts of a frame that is given."""
        if story.first_frame is not None and settings.drafts:
            return {"drafts": "frame 0 is given and not drawn"}
        return {}

    def notices(self, model: Model, story: Story, settings: Settings) -> Iterator[str]:
        """That pictures of characters are not read, and by an export no boxes."""
        if any(frame.is_laid_out for frame in story.frames) and not model.causal.takes_biases:
            yield (
                f"`boxes` and `masks` are not used: {model.name} was exported without inputs for them; export it with "
                "--characters and --boxes"
            )
        if story.initial_pictures:
            yield "`initial_pictures` are read by iterative and reference mode alone; causal mode goes by earlier frames"
        if any(character.references for character in story.characters):
            yield "pictures of characters are read by iterative mode alone; causal mode goes by earlier frames"

    def group(self, story: Story, settings: Settings) -> Hashable:
        """Stories with the same sampling settings and window are drawn side by side, and those with known places apart.

        With these the scores of all rows have a bias, which another kernel adds: in other digits of the same sum.
        """
        shared = replace(settings, seed=0, noise="", style=None, negative_prompt="")
        frames = settings.window if settings.window != "all" else ("all", len(story.frames))
        return shared, frames, places_anybody(story, settings)

    def draw(
        self, model: Model, plans: Sequence[StoryPlan], *, batch_sizes: Sequence[int], size: tuple[int, int]
    ) -> Iterator[Event]:
        """The stories of one group, side by side."""
        return causal(model, plans, batch_sizes=batch_sizes, size=size)

    def method(self, settings: Settings) -> dict[str, str]:
        """Window and drafts."""
        window = settings.window
        said = {"Window": counted(window, "frame") if isinstance(window, int) else "all earlier frames"}
        return said | ({"Drafts": f"{settings.drafts} of frame 0"} if settings.drafts else {})

    def picture_values(self, settings: Settings, round: int) -> dict[str, Any]:
        """Window and drafts."""
        return {"window": settings.window, "drafts": settings.drafts}


register(Causal(), MODES["causal"])
