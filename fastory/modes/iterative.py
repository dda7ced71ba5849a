"""Iterative mode: Story-Adapter (arXiv 2410.06244), section 1 of the algorithms.

x_i^0 = D(c_i, z)                                     round 0: captions alone
R     = [proj(CLIPVision(x_j^{k-1}))] over frames j   references of round k
x_i^k = D(c_i, z, R, l_k)                             rounds k = 1 .. K, every frame i on its own
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from PIL import Image
from torch import Tensor

from fastory.events import Event, FrameDrawn, Notice, RoundFinished, RoundStarted, StepDone
from fastory.models.torch_model import Caption, StoryModel
from fastory.modes.finished import Finished, Nothing
from fastory.modes.memory import until_it_fits
from fastory.pictures import open_picture
from fastory.processors.projected import References
from fastory.sampling.sampler import Row, Sampler, frame_seed
from fastory.settings import Settings
from fastory.story import Story


@dataclass(frozen=True)
class Group:
    """Reference pictures with one weight l_g. tokens[n] is (1, T, C_x), or None for a picture that was left out.

    sees(frame, n): whether `frame` has picture n among its references.
    """

    tokens: Sequence[Tensor | None]
    scale: float
    sees: Callable[[int, int], bool]

    def visible(self, frame: int) -> list[bool]:
        """Which blocks the conditional row of `frame` sees: its references, never the null block at the end."""
        return [tokens is not None and self.sees(frame, n) for n, tokens in enumerate(self.tokens)] + [False]

    def null_visible(self, frame: int) -> list[bool]:
        """Which blocks its unconditional row sees: the null block, where the conditional row sees a reference."""
        return [False] * len(self.tokens) + [any(self.visible(frame))]


@dataclass
class Run:
    """One story being drawn: what stays the same over the rounds of one story, and the micro-batch, which may shrink."""

    model: StoryModel
    story: Story
    settings: Settings
    finished: Finished
    batch_sizes: Sequence[int]
    seeds: Mapping[int, int]
    negative: Caption
    negative_kv: Tensor
    captions: list[Caption] = field(default_factory=list)
    characters: dict[str, list[Tensor]] = field(default_factory=dict)
    halved: int | None = None
    sampler: Sampler | None = None

    def sampler_of(self, size: int) -> Sampler:
        """The sampler for micro-batches of `size`; its buffers and captured graphs serve all rounds."""
        if self.sampler is None or self.sampler.batch_size != size:
            self.sampler = None  # its buffers go before the new ones come
            self.sampler = Sampler(self.model, self.settings, size, *picture_size(self))
        return self.sampler

    @cached_property
    def null_reference(self) -> Tensor:
        """The unconditional reference's tokens (1, T, C_x), once a story."""
        return self.model.null_reference()


def iterative(
    model: StoryModel,
    story: Story,
    settings: Settings,
    *,
    batch_sizes: Sequence[int],
    finished: Finished | None = None,
    seeds: Mapping[int, int] | None = None,
) -> Iterator[Event]:
    """Draw a story round by round (Story-Adapter, section 3); yields events, among them every picture.

    batch_sizes: frames at once in round 0, 1, ..; the last entry stands for all later rounds. `finished` is asked
    again after a BatchHalved, whose round starts anew. seeds: of frames that have one in place of their own and the run's.
    """
    negative = model.encode_negative(settings.negative_prompt)
    negative_kv = project(model, negative)
    run = Run(model, story, settings, finished or Nothing(), batch_sizes, seeds or {}, negative, negative_kv)
    yield from encode_texts(run)
    last: dict[int, Tensor | None] = {}
    for k in range(settings.iterations + 1):
        last = yield from until_it_fits(run, partial(draw_round, run, k, last), k)


def encode_texts(run: Run) -> Iterator[Event]:
    """Caption tokens and the tokens of characters' pictures, once a story; a caption over the limit is reported."""
    model, settings = run.model, run.settings
    for i in range(len(run.story.frames)):
        prompt = run.story.prompt(i, settings.style)
        if lost := model.lost_words(prompt):
            yield Notice(f"frame {i}: the caption is longer than the text encoder reads; left off: {lost!r}")
        run.captions.append(model.encode_caption(prompt))
    shown = settings.reference_start <= settings.iterations
    for character in run.story.characters:
        run.characters[character.name] = [
            model.encode_reference(open_picture(path), settings.reference_fit)
            for path in (character.references if shown else ())
        ]


def draw_round(
    run: Run, k: int, last: dict[int, Tensor | None], size: int
) -> Generator[Event, None, dict[int, Tensor | None]]:
    """All frames of round k that are not finished, `size` at a time; returns the reference tokens of those drawn."""
    settings, current, started = run.settings, dict[int, Tensor | None](), time.monotonic()
    count = len(run.story.frames)
    todo = {i for i in range(count) if not run.finished.has(k, i)}
    if not todo:
        return current
    yield RoundStarted(k, settings.iterations, settings.reference_scale_of(k) if k else 0.0, len(todo))
    groups = reference_groups(run, k, last)
    sampler = run.sampler_of(size)
    sampler.set_round(share(run, groups))
    # A frame always has the same place among the same others, finished ones included: where a library's rounding
    # depends on the place, a resumed run still gives the same bytes.
    for members in (range(first, min(first + size, count)) for first in range(0, count, size)):
        if todo.isdisjoint(members):
            continue
        rows = [make_row(run, groups, i) for i in members]
        yield from report_steps(sampler, rows, k, todo)
        for n, row in enumerate(rows):
            if row.frame not in todo:
                continue
            decoded = run.model.decode(sampler.latents[n : n + 1])
            if k < settings.iterations:
                current[row.frame] = encode_unless_left_out(run, decoded.image, decoded.left_out)
            yield FrameDrawn(k, row.frame, decoded.image, row.seed, decoded.left_out)
    yield RoundFinished(k, settings.iterations, time.monotonic() - started)
    return current


def report_steps(sampler: Sampler, rows: Sequence[Row], k: int, todo: Container[int]) -> Iterator[Event]:
    """Denoise a micro-batch, with an event a step that names the frames it is for."""
    frames = tuple(row.frame for row in rows if row.frame in todo)
    for step, seconds in sampler.denoise(rows):
        yield StepDone(k, frames, step, sampler.settings.steps, seconds)


def reference_groups(run: Run, k: int, last: dict[int, Tensor | None]) -> list[Group]:
    """The references of round k: the last round's frames as one group, then a group for each character's pictures.

    A frame of the last round that was not drawn just now is loaded and encoded here: every frame once a round.
    """
    settings, story, groups = run.settings, run.story, []
    if k > 0:
        for j in range(len(story.frames)):
            if j not in last:
                last[j] = encode_unless_left_out(run, *run.finished.load(k - 1, j))
        tokens = [last[j] for j in range(len(story.frames))]
        groups.append(Group(tokens, settings.reference_scale_of(k), frames_seen(story, settings.references)))
    for character in story.characters:
        if run.characters[character.name] and k >= settings.reference_start:
            scale = settings.reference_scale_of(max(k, 1)) if character.scale is None else character.scale
            groups.append(Group(run.characters[character.name], scale, in_cast(story, character.name)))
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


def encode_unless_left_out(run: Run, image: Image.Image, left_out: str | None) -> Tensor | None:
    """Reference tokens of a picture, or None for one that must not become a reference."""
    return None if left_out else run.model.encode_reference(image, run.settings.reference_fit)


@torch.inference_mode()
def share(run: Run, groups: Sequence[Group]) -> References:
    """What every row of round k reads: reference K/V once a round, each group ending with its null block."""
    model = run.model
    blocks: list[Tensor] = []
    if groups:
        null = run.null_reference
        for group in groups:
            blocks += [torch.zeros_like(null) if tokens is None else tokens for tokens in group.tokens] + [
                null
            ]
        ref_kv = model.layers.project_references(torch.cat(blocks, dim=1))
    else:
        ref_kv = torch.zeros(1, 0, model.layers.width, device=model.device, dtype=model.dtype)
    bounds = [0]
    for group in groups:
        bounds.append(bounds[-1] + (len(group.tokens) + 1) * model.tokens_per_ref)
    scale = torch.tensor([group.scale for group in groups] or [0.0], dtype=torch.float32, device=model.device)
    offsets = torch.tensor(bounds if groups else [0, 0], dtype=torch.int32, device=model.device)
    return References(ref_kv, scale, offsets, model.tokens_per_ref, run.negative_kv.shape[1])


def make_row(run: Run, groups: Sequence[Group], frame: int) -> Row:
    """One frame's inputs: the seed of its noise, its text K/V (once a frame and round), and which references it sees."""
    visible = [seen for group in groups for seen in group.visible(frame)]
    null_visible = [seen for group in groups for seen in group.null_visible(frame)]
    return Row(
        frame=frame,
        seed=frame_seed(run.story.frames[frame].seed, run.seeds.get(frame), run.settings, frame),
        caption=run.captions[frame],
        negative=run.negative,
        inputs=(project(run.model, run.captions[frame]), torch.tensor([visible], dtype=torch.bool)),
        null_inputs=(run.negative_kv, torch.tensor([null_visible], dtype=torch.bool)),
    )


@torch.inference_mode()
def project(model: StoryModel, caption: Caption) -> Tensor:
    """Text K/V (1, Lt, W) of a caption."""
    return model.layers.project_text(caption.tokens)


def picture_size(run: Run) -> tuple[int, int]:
    """Width and height in pixels: as set, else the model's own."""
    width, height = run.model.native_size
    return run.settings.width or width, run.settings.height or height
