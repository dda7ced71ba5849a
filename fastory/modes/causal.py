"""Causal mode: AR-LDM (WACV 2024) with the local window of Causal-Story (ICASSP 2024); section 2 of the algorithms.

x_t = D(c_t, z_t, [CLIP(c_t) ; h_{t-L} .. h_{t-1}])     frame after frame, from its caption and the last L_M frames
h_t = history(c_t, x_t)                                 encoded once, then in the ring until L_M frames came after it

A caption leaves open what its characters look like, and a UNet may begin a story with a picture between two looks, which
every later frame would take for another one of them. With drafts, frame 0 is drawn, taken into the history alone, and drawn
again from it, with the same noise: what the history makes of it is what it will make of it later.

Frames of one story wait for each other, so several stories are drawn side by side, one frame of each at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastory.conditioning.history import HistoryConfig, Ring, Seen
from fastory.errors import InputError
from fastory.events import Event, FrameDrawn, Notice, StepDone
from fastory.models.torch_model import Caption, StoryModel
from fastory.modes.finished import Finished, Nothing
from fastory.modes.memory import until_it_fits
from fastory.pictures import open_picture
from fastory.processors.projected import Window
from fastory.sampling.sampler import Row, Sampler, frame_seed
from fastory.settings import Settings
from fastory.story import Story
from fastory.wording import counted


@dataclass
class Telling:
    """One of the stories that are drawn side by side. place: in the call. seeds: as in iterative mode.

    ring holds the history up to frame `told` - 1.
    """

    place: int
    story: Story
    settings: Settings
    finished: Finished = field(default_factory=Nothing)
    seeds: Mapping[int, int] = field(default_factory=dict)
    ring: Ring | None = None
    told: int = 0

    def needs(self, frame: int) -> bool:
        """Whether `frame` is to be drawn."""
        return frame < len(self.story.frames) and not self.finished.has(0, frame)


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


class Company:
    """Stories drawn side by side with one model, window and sampler."""

    def __init__(
        self,
        model: StoryModel,
        tellings: Sequence[Telling],
        batch_sizes: Sequence[int],
        size: tuple[int, int],
    ) -> None:
        """batch_sizes: stories at once at frame 0, 1, ..; size: of the pictures, (width, height) in pixels."""
        self.history = model.require_history()
        self.model, self.tellings, self.size = model.causal, tellings, size
        self.batch_sizes = batch_sizes
        self.halved: int | None = None
        self.settings = tellings[0].settings
        frames = max(len(telling.story.frames) for telling in tellings)
        self.window = window_of(self.history.encoder.config, self.settings, frames)
        self.sampler: Sampler | None = None
        self.negatives: dict[str, tuple[Caption, Tensor, Tensor]] = {}

    def sampler_of(self, size: int) -> Sampler:
        """The sampler for `size` stories at once; its buffers and its captured graph serve all frames."""
        if self.sampler is None or self.sampler.batch_size != size:
            self.sampler = None  # its buffers go before the new ones come
            self.sampler = Sampler(self.model, self.settings, size, *self.size)
            tokens = self.history.encoder.config.frame_tokens
            limit = int(self.model.pipeline.tokenizer.model_max_length)
            self.sampler.set_round(Window(limit, tokens, self.window, self.table))
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
        kind = self.history.encoder.type_embeddings.weight[0]
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
    def tell(self, telling: Telling, frame: int, picture: Image.Image | None) -> None:
        """Append a finished frame to the history, which frame 0 begins anew. None: left out, nobody sees its frame."""
        if frame == 0:
            telling.ring = self.new_ring()
        prompt = telling.story.prompt(frame, telling.settings.style)
        seen = self.model.encode_frame(prompt, picture or Image.new("RGB", self.size))
        if picture is None:
            seen = Seen(seen.tokens, torch.ones_like(seen.padding))
        assert telling.ring is not None
        telling.ring.append(seen)
        telling.told = frame + 1

    def catch_up(self, telling: Telling, frame: int) -> None:
        """The history before `frame`, from the finished pictures.

        Frame by frame, as it was made the first time, so that the bytes are the same. The newest L_M frames hold what
        the L_M - 1 before each of them said: 2 L_M - 1 frames are enough.
        """
        first = max(telling.told, frame - (2 * self.window - 1), 0)
        if telling.ring is None or first > telling.told:
            telling.ring = self.new_ring()
        for i in range(first, frame):
            picture, left_out = telling.finished.load(0, i)
            self.tell(telling, i, None if left_out else picture)

    @torch.inference_mode()
    def row(self, telling: Telling, frame: int) -> Row:
        """One frame's inputs: the seed of its noise, its caption, its history."""
        self.catch_up(telling, frame)
        settings = telling.settings
        caption, caption_kv, caption_padding = self.caption(telling.story.prompt(frame, settings.style))
        negative, negative_kv, negative_padding = self.negative(settings.negative_prompt)
        assert telling.ring is not None
        kv, padding = telling.ring.keys_values()
        null_kv, null_padding = telling.ring.null_keys_values(*self.null)
        return Row(
            frame=frame,
            seed=frame_seed(telling.story.frames[frame].seed, telling.seeds.get(frame), settings, frame),
            caption=caption,
            negative=negative,
            inputs=(torch.cat([caption_kv, kv], 1), torch.cat([caption_padding, padding], 1)),
            null_inputs=(
                torch.cat([negative_kv, null_kv], 1),
                torch.cat([negative_padding, null_padding], 1),
            ),
        )


def causal(
    model: StoryModel, tellings: Sequence[Telling], *, batch_sizes: Sequence[int], size: tuple[int, int]
) -> Iterator[Event]:
    """Draw stories side by side, frame after frame; yields events, among them every picture.

    All stories have the same sampling settings and window (those of the first one are used). batch_sizes: stories at
    once at frame 0, 1, ..; the last entry stands for all later frames. size: (width, height) in pixels. A story's
    first_frame is its frame 0 as it is (continuation); otherwise frame 0 is drawn from its caption (visualization).
    """
    company = Company(model, tellings, batch_sizes, size)
    for telling in tellings:
        yield from long_captions(company, telling)
    for frame in range(max(len(telling.story.frames) for telling in tellings)):
        if any(telling.needs(frame) for telling in tellings):
            yield from until_it_fits(company, partial(draw_frame, company, frame), 0, frame)


def long_captions(company: Company, telling: Telling) -> Iterator[Event]:
    """A notice for every caption over the text encoder's limit."""
    for i in range(len(telling.story.frames)):
        if lost := company.model.lost_words(telling.story.prompt(i, telling.settings.style)):
            yield Notice(f"frame {i}: the caption is longer than the text encoder reads; left off: {lost!r}")


def draw_frame(company: Company, frame: int, size: int) -> Generator[Event, None, None]:
    """Frame `frame` of every story that lacks it, `size` stories at a time."""
    tellings = company.tellings
    # A story always has the same place among the others, those that are finished included, as in iterative mode.
    for members in (tellings[first : first + size] for first in range(0, len(tellings), size)):
        todo = [telling for telling in members if telling.needs(frame)]
        for telling in [one for one in todo if frame == 0 and one.story.first_frame is not None]:
            yield given_frame(company, telling)
            todo.remove(telling)
        if not todo:
            continue
        sampler = company.sampler_of(size)
        drafts = company.settings.drafts if frame == 0 else 0
        for telling in todo if drafts else ():  # memory may have run out behind a draft
            telling.ring, telling.told = None, 0
        for draft in range(1, drafts + 1):
            yield from denoise(company, sampler, members, todo, frame, draft)
            for n in places(members, todo):
                decoded = company.model.decode(sampler.latents[n : n + 1])
                company.tell(members[n], frame, None if decoded.left_out else decoded.image)
        rows = yield from denoise(company, sampler, members, todo, frame)
        for n in places(members, todo):
            yield finish_frame(company, members[n], frame, rows[n], sampler.latents[n : n + 1])


def places(members: Sequence[Telling], todo: Sequence[Telling]) -> list[int]:
    """Where in the batch those are that are drawn."""
    return [n for n, telling in enumerate(members) if telling in todo]


def denoise(
    company: Company,
    sampler: Sampler,
    members: Sequence[Telling],
    todo: Sequence[Telling],
    frame: int,
    draft: int = 0,
) -> Generator[Event, None, list[Row]]:
    """Denoise `frame` of all members, of which those in `todo` count; returns their rows. draft: as in StepDone.

    A member that is not drawn keeps its place by standing in for one that is.
    """
    drawn = {telling.place: company.row(telling, frame) for telling in todo}
    stand_in = next(iter(drawn.values()))
    rows = [drawn.get(telling.place, stand_in) for telling in members]
    for step, seconds in sampler.denoise(rows):
        for telling in todo:
            yield StepDone(0, (frame,), step, sampler.settings.steps, seconds, telling.place, draft)
    return rows


def finish_frame(company: Company, telling: Telling, frame: int, row: Row, latents: Tensor) -> FrameDrawn:
    """Decode a frame and take it into the history, where a later frame will see it."""
    decoded = company.model.decode(latents)
    if frame + 1 < len(telling.story.frames):
        company.tell(telling, frame, None if decoded.left_out else decoded.image)
    return FrameDrawn(0, frame, decoded.image, row.seed, decoded.left_out, place=telling.place)


def given_frame(company: Company, telling: Telling) -> FrameDrawn:
    """Frame 0 of a continuation: the given picture, cropped to the story's shape."""
    assert telling.story.first_frame is not None
    picture = ImageOps.fit(open_picture(telling.story.first_frame), company.size, Image.Resampling.LANCZOS)
    company.tell(telling, 0, picture)
    return FrameDrawn(0, 0, picture, telling.settings.seed, None, place=telling.place)
