"""Characters of a frame with references of their own, each where it stands (the setting `regions`).

A character's references are its own appearances in the last round's pictures: those where it is alone, and if it never is,
what its mask cuts out of the others. They reach its mask in the frame; what no character has sees the story's pictures. Where a
frame has no boxes or masks, the masks of round k are found in its picture of round k - 1, by one UNet call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fastory.builtin.words import SPECIES_WORDS, animals
from fastory.conditioning.references import Group, ReferenceContext, References
from fastory.conditioning.regions import Grid, apart, cut_out, from_maps, rest_of, self_bias, text_bias
from fastory.errors import InputError
from fastory.models.protocol import Caption, Model, UnetInputs
from fastory.models.text import token_places
from fastory.modes.weighting import weights_of
from fastory.pictures import open_picture
from fastory.settings import MODES, Settings
from fastory.story import Story

NEEDED = (
    "they need rounds, a model that takes masks, and two named characters (or boxes or masks), with auto not the references "
    "`all`; in causal mode a frame of two named characters and no export"
)
NOISE = 0.3  # of the noise schedule: outlines are set and the UNet still asks the caption what is where
FEW = 3  # two pictures that see each other alone swap their looks, round after round
Mentions = Mapping[str, Sequence[tuple[int, int]]]
"""The characters of a frame, each with where the prompt speaks of it: first letter, and one past the last."""


def mentions(story: Story, i: int, prompt: str, plain: bool) -> dict[str, list[tuple[int, int]]]:
    """Who is in frame i, in the story's order, and what the prompt says of its look.

    plain: the animals of the built-in world are, named or not.
    """
    if plain:
        found = {name: animals(name).finditer(prompt) for name in SPECIES_WORDS}
        spans = {name: [match.span() for match in matches] for name, matches in found.items()}
        return {name: own for name, own in spans.items() if own}
    spans_of: dict[str, list[tuple[int, int]]] = {
        character.name: [] for character in story.characters if character.name in story.cast(i)
    }
    for name, first, end in story.spans(prompt):
        spans_of.setdefault(name, []).append((first, end))
    return spans_of


def without(prompt: str, spans: Sequence[tuple[int, int]]) -> str:
    """The prompt, what it says of a character left out."""
    for first, end in sorted(spans, reverse=True):
        prompt = prompt[:first] + prompt[end:]
    return prompt


def named(story: Story, settings: Settings) -> list[str]:
    """The characters of a story whose regions are not off: those it names, else the animals of its captions."""
    return list(dict.fromkeys(name for cast in _casts(story, settings) for name in cast))


def check_findable(model: Model, story: Story, settings: Settings) -> None:
    """InputError where the UNet call that finds the characters of a frame has more rows than this model takes.

    One for the whole caption, and one for it without each character.
    """
    if settings.regions == "off":
        return
    rows = [
        1 + len(cast)
        for frame, cast in zip(story.frames, _casts(story, settings), strict=True)
        if len(cast) > 1 and not cast.keys() <= {*dict(frame.boxes), *dict(frame.masks)}
    ]
    if rows:
        model.check_drawable(settings.width or 0, settings.height or 0, 1, 1, max(rows))


def _casts(story: Story, settings: Settings) -> list[dict[str, list[tuple[int, int]]]]:
    plain = not story.characters
    return [mentions(story, i, story.prompt(i, settings.style), plain) for i in range(len(story.frames))]


def settled(model: Model, story: Story, settings: Settings, prompts: Sequence[str]) -> str:
    """The setting `regions` as it decides this story: `off` where it changes nothing, or the model takes no masks."""
    able = model.causal.takes_biases if _frame_after_frame(settings) else model.takes_masks
    return wanted(model, story, settings, prompts) if able else "off"


def wanted(model: Model, story: Story, settings: Settings, prompts: Sequence[str]) -> str:
    """The same of a model that takes masks.

    In rounds boxes and masks always count; with `auto` the rule `all` without them is the paper's, where every frame sees every
    picture whole. Frame after frame it decides whether those of a frame are found who have no box.
    """
    plain = is_plain(model, story, settings)
    if settings.regions == "off" or not (plain or story.characters):
        return "off"
    casts = [mentions(story, i, prompt, plain) for i, prompt in enumerate(prompts)]
    if _frame_after_frame(settings):
        return settings.regions if any(len(cast) > 1 for cast in casts) else "off"
    laid_out = any(frame.is_laid_out for frame in story.frames)
    if settings.references == "all" and settings.regions == "auto" and not laid_out:
        return "off"
    several = len({name for cast in casts for name in cast}) > 1
    return settings.regions if laid_out or (several and settings.iterations) else "off"


def _frame_after_frame(settings: Settings) -> bool:
    """Whether places are found while a frame is drawn: the mode reads `regions` and has no rounds."""
    own = MODES[settings.mode].own
    return "regions" in own and "iterations" not in own


def no_masks(model: Model, story: Story, settings: Settings, prompts: Sequence[str]) -> tuple[str, ...]:
    """A line where a story's regions are off, or half of its boxes, because of what a model was exported without."""
    by_frame = _frame_after_frame(settings)
    able = model.causal.takes_biases if by_frame else model.takes_biases
    if able or wanted(model, story, settings, prompts) == "off":
        return ()
    if by_frame:
        return (
            f"regions are off: {model.name} was exported without inputs for places, and causal mode looks for nobody; for "
            f"characters that keep to theirs export it with --characters {len(named(story, settings))} --boxes",
        )
    laid_out = any(frame.is_laid_out for frame in story.frames)
    if not model.takes_masks:
        count = f"{len(named(story, settings))}{' --boxes' if laid_out else ''}"
        return (
            f"regions are off: {model.name} was exported without masks, and its characters see all pictures alike; for "
            f"references of their own export it with --characters {count}",
        )
    if laid_out:
        return (
            f"`boxes` and `masks` hold characters' references alone: {model.name} was exported without what keeps their words "
            "and self-attention there; export it with --boxes as well",
        )
    return ()


def check_layout(story: Story, size: tuple[int, int]) -> None:
    """InputError for the box or mask of a character that its frame does not have, and for a mask of another form.

    size: of the pictures that are drawn, (width, height).
    """
    for i, frame in enumerate(story.frames):
        for kind, key, placed in (("box", "boxes", frame.boxes), ("mask", "masks", frame.masks)):
            for name in dict(placed):
                where = story.where(("frames", i, key, name)) or f"frame {i}"
                if name not in story.cast(i):
                    raise InputError(
                        f"{where}: the {kind} of {name}: wanted a character of frame {i}, got one that neither its caption nor "
                        f"its `characters:` names; name it there or remove the {kind}"
                    )
        for name, mask in frame.masks:
            shown = open_picture(mask).size
            if not _are_of_one_form(shown, size):
                where = story.where(("frames", i, "masks", name)) or f"frame {i}"
                raise InputError(
                    f"{where}: the mask of {name}: wanted the form of the pictures, {size[0]} x {size[1]}, in any size, got "
                    f"{shown[0]} x {shown[1]}; crop it, or give width and height"
                )


def placed(story: Story, grid: Grid) -> list[dict[str, Tensor]]:
    """Where the boxes and masks of each frame put its characters, (h, w) of the latents."""
    return [
        {
            **{name: grid.box(box) for name, box in frame.boxes},
            **{name: grid.mask(open_picture(mask)) for name, mask in frame.masks},
        }
        for frame in story.frames
    ]


def _are_of_one_form(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether height to width is the same within 2 %, which the rounding of a size to whole pixels may cost."""
    return abs(first[0] * second[1] / (first[1] * second[0]) - 1) <= 0.02


def medoids(tokens: Sequence[Tensor], count: int) -> list[int]:
    """The `count` that stand for all of `tokens` (1, T, C_x) best, by cosine distance, in their own order.

    One after the other the one that brings all nearest to those chosen: the build of k-medoids (Kaufman and Rousseeuw, 1990).
    """
    flat = functional.normalize(torch.cat([picture.float().flatten(1) for picture in tokens]), dim=1).cpu()
    distances = 1 - flat @ flat.T
    chosen: list[int] = []
    nearest = torch.full((len(tokens),), 2.0)  # no cosine distance is larger
    for _ in range(count):
        after = torch.minimum(nearest, distances).sum(1)
        after[chosen] = torch.inf
        chosen.append(int(after.argmin()))
        nearest = torch.minimum(nearest, distances[chosen[-1]])
    return sorted(chosen)


def is_plain(model: Model, story: Story, settings: Settings) -> bool:
    """Whether the animals of the captions are the characters: a story that names none, and a model of the drawn world."""
    return settings.regions != "off" and not story.characters and model.world is not None


@dataclass(frozen=True)
class Seen:
    """What a picture of the last round gives the next one.

    whole: its reference tokens (1, T, C_x), None for one that was left out. own: those of each character in it. masks: where
    the characters are, (h, w); none where they could not be told apart. latents: the picture as the UNet's (1, c, h, w), where
    its frame's next one begins from it.
    """

    whole: Tensor | None
    own: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None

    def to(self, device: torch.device) -> Seen:
        """The same on another device; masks stay on the CPU, where they are made."""
        whole = None if self.whole is None else self.whole.to(device)
        own = {name: tokens.to(device) for name, tokens in self.own.items()}
        latents = None if self.latents is None else self.latents.to(device)
        return Seen(whole, own, self.masks, latents)


def beside(
    model: Model, captions: Sequence[Caption], guidance_scale: float, size: tuple[int, int]
) -> tuple[Tensor | None, dict[str, Tensor] | None]:
    """What a UNet reads beside text: the guidance if it is distilled with it, and SDXL's conditions; else None.

    size: of the pictures, (width, height) in pixels.
    """
    cond, added = None, None
    if model.sizes.guidance_embedding is not None:
        cond = model.guidance_embedding(guidance_scale, len(captions))
    pooled = [caption.pooled for caption in captions if caption.pooled is not None]
    if pooled:
        rows = [model.added_conditions(vector, *size) for vector in pooled]
        added = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return cond, added


def changes(model: Model, inputs: UnetInputs, left_out: Iterable[str]) -> dict[str, Tensor]:
    """How much each part of the prediction changes without a character's words: maps (h, w) on the CPU, by name.

    inputs: a row that reads the whole caption, and a row for each character that is left out.
    """
    predicted = model.predict(inputs)
    change = (predicted[1:] - predicted[:1]).float().abs().mean(1).cpu()
    return dict(zip(left_out, change, strict=True))


class Regions:
    """Who is in which frame, and what each of them sees."""

    def __init__(
        self,
        model: Model,
        story: Story,
        settings: Settings,
        prompts: Sequence[str],
        captions: Sequence[Caption],
        size: tuple[int, int],
    ) -> None:
        """prompts, captions: of every frame. size: of the pictures, (width, height) in pixels."""
        self.model, self.settings, self.captions, self.size = model, settings, captions, size
        plain = is_plain(model, story, settings)
        self.casts = [mentions(story, i, prompt, plain) for i, prompt in enumerate(prompts)]
        self.names = list(dict.fromkeys(name for cast in self.casts for name in cast))
        self.sources = {name: self._sources(name) for name in self.names}
        self.prompts = prompts
        self._encoded: dict[int, dict[str, Caption]] = {}
        self.grid = Grid(size[1] // model.vae_factor, size[0] // model.vae_factor)
        self.laid_out = placed(story, self.grid)
        self.words = self.grid if any(self.laid_out) and model.takes_biases else None

    def _sources(self, name: str) -> list[int]:
        """The frames whose pictures are a character's references: a cut-out of a picture of several shows it less well."""
        bank = self.settings.bank_size or len(self.casts)
        frames = [i for i, cast in enumerate(self.casts[:bank]) if name in cast]
        alone = [i for i in frames if len(self.casts[i]) == 1]
        return alone or frames

    def see(self, i: int, image: Image.Image, shown: Image.Image, whole: Tensor | None) -> Seen:
        """What the picture of frame i gives the next round.

        image: as it was drawn, where characters are looked for. shown: as a reference. whole: the reference tokens of `shown`.
        """
        cast = list(self.casts[i])
        if whole is None or not cast:
            return Seen(whole)
        if len(cast) == 1 and not self.laid_out[i]:
            return Seen(whole, {cast[0]: whole})
        masks = self._located(i, image)
        own = {}
        for name, mask in masks.items():
            if i in self.sources[name]:
                others = [shape for other, shape in masks.items() if other != name]
                part = cut_out(shown, mask, torch.stack(others).sum(0).clamp(max=1) if others else None)
                if part is not None:
                    own[name] = self.model.encode_reference(part, self.settings.reference_fit)
        return Seen(whole, own, masks)

    def _located(self, i: int, image: Image.Image) -> dict[str, Tensor]:
        """Masks of the characters in the picture of frame i; none where one of several has neither box nor words."""
        masks = dict(self.laid_out[i])
        missing = [name for name in self.casts[i] if name not in masks]
        if missing:
            found = self._maps(i, image)
            if any(name not in found for name in missing):
                return {}
            masks |= {name: mask for name, mask in from_maps(found, self.grid).items() if name in missing}
        return apart({name: masks[name] for name in self.casts[i]})

    @torch.inference_mode()
    def _maps(self, i: int, image: Image.Image) -> dict[str, Tensor]:
        """How much each part of a picture changes where the caption leaves a character's words out: one UNet call.

        The picture is noised once; a row reads the whole caption, and one a character the rest of it.
        """
        model, left_out = self.model, self._left_out(i)
        captions = [self.captions[i], *left_out.values()]
        scheduler = DDPMScheduler.from_config(dict(model.scheduler_config))
        step = torch.tensor(int(NOISE * scheduler.config.num_train_timesteps))
        latents = model.encode_picture(image)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
        noisy = scheduler.add_noise(latents, noise, step).repeat(len(captions), 1, 1, 1)
        inputs = UnetInputs(
            noisy,
            step.to(latents.device),
            self._text_alone(i, captions),
            *beside(model, captions, self.settings.guidance_scale, self.size),
        )
        return changes(model, inputs, left_out)

    def _left_out(self, i: int) -> dict[str, Caption]:
        """The caption of frame i without the words of each character that it names; encoded once, for all rounds."""
        if i not in self._encoded:
            self._encoded[i] = {
                name: self.model.encode_caption(without(self.prompts[i], spans))
                for name, spans in self.casts[i].items()
                if spans
            }
        return self._encoded[i]

    def _text_alone(self, i: int, captions: Sequence[Caption]) -> ReferenceContext:
        """A row a caption, without references."""
        text_kv = [self.model.layers.project_text(caption.tokens) for caption in captions]
        references = References.of(
            (),
            lambda: text_kv[0],
            lambda tokens: tokens,
            tokens_per_ref=self.model.tokens_per_ref,
            like=text_kv[0],
        )
        context = references.context(len(captions))
        for index, row in enumerate(text_kv):
            context.put(index, references.row(i, row))
        return context

    def places(self, i: int, last: Mapping[int, Seen]) -> dict[str, Tensor | None]:
        """The mask of each character of frame i, None for the whole picture; nobody where they could not be told apart."""
        cast = list(self.casts[i])
        if len(cast) == 1 and not self.laid_out[i]:
            return {cast[0]: None}
        if set(self.laid_out[i]) == set(cast) and cast:
            return {**apart(self.laid_out[i])}
        return dict(last[i].masks) if i in last else {}

    def rest(self, i: int, last: Mapping[int, Seen]) -> Tensor | None:
        """Where frame i sees the story's pictures; None for everywhere.

        Nowhere before its first picture, where several characters are in it and nobody knows where: everywhere, each of them
        would take over the looks of all.
        """
        masks = self.places(i, last)
        if not masks:
            unknown = i not in last and len(self.casts[i]) > 1
            return torch.zeros(self.grid.height, self.grid.width) if unknown else None
        return rest_of(
            [torch.ones(self.grid.height, self.grid.width) if m is None else m for m in masks.values()]
        )

    def mask_of(self, name: str, last: Mapping[int, Seen]) -> Callable[[int], Tensor | None]:
        """Where a character's references reach, by frame."""
        return lambda i: self.places(i, last).get(name)

    def text_bias(self, i: int, count: int) -> dict[int, Tensor] | None:
        """Where the words of frame i's characters reach, with boxes; None in a story without. count: of text tokens."""
        if self.words is None:
            return None
        masks = apart(self.laid_out[i])
        words = token_places(self.model.tokenizer, self.prompts[i], self.casts[i])
        return text_bias(masks, words, count, self.grid)

    def self_bias(self, i: int) -> dict[int, Tensor] | None:
        """How far frame i's characters see each other, with boxes; None in a frame without."""
        if self.words is None or not self.laid_out[i]:
            return None
        return self_bias(list(apart(self.laid_out[i]).values()), self.grid)

    def groups(self, k: int, last: Mapping[int, Seen]) -> Iterator[Group]:
        """A group for each character: its appearances in the last round."""
        rule = self.settings.references
        for name in self.names:
            frames = [j for j in self.sources[name] if j in last and name in last[j].own]
            if not frames:
                continue
            if 0 < self.settings.cast_limit < len(frames):
                kept = medoids([last[j].own[name] for j in frames], self.settings.cast_limit)
                frames = [frames[n] for n in kept]

            def sees(i: int, n: int, name: str = name, frames: Sequence[int] = frames) -> bool:
                own_too = rule == "all" or len(frames) < FEW
                return name in self.places(i, last) and (own_too or frames[n] != i)

            tokens = [last[j].own[name] for j in frames]
            weights = weights_of(tokens, self.settings)
            yield Group(tokens, self.settings.reference_scale_of(k), sees, self.mask_of(name, last), weights)
