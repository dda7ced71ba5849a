"""Whether the UNet's blocks are compiled for the stories of a call: the time it takes against the time it saves."""

from __future__ import annotations

from collections.abc import Sequence

from fastory.errors import InputError
from fastory.models.protocol import Model
from fastory.processors.compiled import cache_folder
from fastory.runs.resolve import ResolvedStory
from fastory.runtime import frame_bytes
from fastory.sampling.sampler import is_guided

# Both predicted for an H100 and measured on no GPU (bench/README.md, "Predicted, not measured: a step"). A graph that no
# process has compiled yet takes so long; a denoising step of a frame is shorter by so much a byte of frame_bytes.
SECONDS_A_GRAPH = 4.0
SAVED_A_BYTE = 5e-12


def decide(stories: Sequence[ResolvedStory]) -> tuple[bool, str | None]:
    """Whether runs that begin now are compiled, and the line that says why; no line where nobody could expect it.

    A function of the stories, the model and the words given alone: never of a clock or of what is compiled already, on which a
    picture's bytes would then depend.
    """
    if not stories:
        return False, None
    model = stories[0].model
    if model.compile == "off" or (model.compile == "auto" and model.placement.device.type != "cuda"):
        return False, None
    kinds = model.blocks().kinds
    if model.compile == "on":
        return (
            True,
            f"{kinds} graphs of the UNet's blocks are compiled, as asked for; kept in {cache_folder()}",
        )
    steps = sum(_steps(story) for story in stories)
    saved, taken = sum(map(_saved, stories)), kinds * SECONDS_A_GRAPH
    why = f"{steps} steps of a frame save about {saved:.0f} s, compiling takes about {taken:.0f} s (both predicted)"
    if saved <= taken:
        return False, f"the UNet's blocks are not compiled: {why}; --compile on compiles them all the same"
    return True, f"{kinds} graphs of the UNet's blocks are compiled: {why}; kept in {cache_folder()}"


def _steps(story: ResolvedStory) -> int:
    settings = story.settings
    return len(story.prompts) * sum(settings.steps_of(k) for k in range(settings.rounds))


def _saved(story: ResolvedStory) -> float:
    model, settings, factor = story.model, story.settings, story.model.vae_factor
    width, height = (settings.width or 0) // factor, (settings.height or 0) // factor
    channels, guided = model.sizes.first_channels, is_guided(model, settings)
    return _steps(story) * SAVED_A_BYTE * frame_bytes(channels, model.placement.dtype, width, height, guided)


def as_began(model: Model, compiled: bool) -> Model:
    """The model as a run began, compiled or not. Raises InputError where the user asked for the other."""
    if (compiled, model.compile) in ((True, "off"), (False, "on")):
        began, word = ("with compiled blocks", "auto") if compiled else ("without compiled blocks", "off")
        raise InputError(
            f"this run began {began}; give --compile {word} to go on with it, or --overwrite to begin anew"
        )
    return model.compiled if compiled else model
