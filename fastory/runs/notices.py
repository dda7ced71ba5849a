"""What the user should know of a run before it begins: what is given and not used, what will not come out as it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fastory.models.protocol import Model
from fastory.modes.mode import mode_of
from fastory.sampling.sampler import is_guided
from fastory.settings import Settings, unused
from fastory.story import Story


def unused_notices(model: Model, story: Story, settings: Settings, sources: Mapping[str, str]) -> list[str]:
    """A line for every value that was given, by flag, story file or preset, and decides nothing."""
    reasons = mode_of(settings.mode).unused(story, settings)
    if not is_guided(model, settings):
        why = "without guidance there is no unconditional row (guidance_scale 1 or less, or an LCM UNet)"
        reasons["guidance_interval"] = why
        if settings.negative_prompt:
            reasons["negative_prompt"] = why
    if all(frame.seed is not None for frame in story.frames):
        decided = ("seed",) if settings.noise == "per-round" else ("seed", "noise")
        reasons |= dict.fromkeys(decided, "every frame has a seed of its own")
    twice = [
        f"`settings: {name}` is not used: the story says `{name}:` itself, which comes first"
        for name, own in (("style", story.style), ("negative_prompt", story.negative_prompt))
        if own is not None and name in story.settings
    ]
    return [*unused(settings, sources, reasons), *twice]


def story_notices(model: Model, story: Story, settings: Settings, prompts: Sequence[str]) -> Iterator[str]:
    """What the user should know before drawing begins. prompts: one a frame, as the text encoder gets them."""
    yield from mode_of(settings.mode).notices(model, story, settings)
    if model.world is None:
        return
    yield from _size_notice(model, settings)
    from fastory.builtin.words import look_notice, notice_of, unknown_words

    names = {character.name: "" for character in story.characters}
    if unknown := unknown_words(" ".join(prompts), names, tokenizer=model.tokenizer):
        yield notice_of(unknown)
    if undrawn := look_notice(" ".join(prompts), names, tokenizer=model.tokenizer):
        yield undrawn


def _size_notice(model: Model, settings: Settings) -> Iterator[str]:
    """Where the built-in model does not draw what captions say any more: it was trained at one small size."""
    width, height = model.native_size
    sides = ((settings.width or width, width), (settings.height or height, height))
    # Looked at: at 1.25 of a side pictures are smudged here and there; at 1.5 animals come twice, at 0.75 colours are lost.
    if not all(own <= side <= 1.25 * own for side, own in sides):
        yield (
            f"the built-in model was trained at {width} x {height} pixels; at {settings.width} x {settings.height} it repeats "
            "its animals or smears them: leave out width and height, or give a checkpoint with --model"
        )
