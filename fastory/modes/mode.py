"""What a mode is, and the modes by name. A mode is one file: one paper's algorithm, and what it says of itself.

Who runs stories asks the mode and never its name: what it needs, how stories are grouped, how it is described.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from fastory.errors import InputError
from fastory.events import Event, Notice
from fastory.models.protocol import Model
from fastory.modes.executor import HERE, Executor
from fastory.modes.finished import Finished, Nothing
from fastory.settings import MODES, ModeTraits, Settings
from fastory.story import Story


@dataclass(frozen=True)
class StoryPlan:
    """One story as a mode draws it. index: in the call. prompts: of every frame, with the style.

    finished: pictures that exist already. seeds: of frames that have one in place of their own and the run's. executor: where
    its frames are drawn, for a mode whose frames do not wait for each other.
    """

    story: Story
    settings: Settings
    index: int = 0
    finished: Finished = field(default_factory=Nothing)
    seeds: Mapping[int, int] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    executor: Executor = HERE

    def __post_init__(self) -> None:
        """The prompts are resolved here where they are not given."""
        if not self.prompts:
            frames, style = range(len(self.story.frames)), self.settings.style
            object.__setattr__(self, "prompts", tuple(self.story.prompt(i, style) for i in frames))


def long_captions(model: Model, plan: StoryPlan) -> Iterator[Event]:
    """A notice for every caption over the text encoder's limit."""
    for i, prompt in enumerate(plan.prompts):
        if lost := model.lost_words(prompt):
            yield Notice(f"frame {i}: the caption is longer than the text encoder reads; left off: {lost!r}")


def not_read(story: Story, mode: str, goes_by: str) -> Iterator[str]:
    """A line for all of a story that a mode without characters does not read. goes_by: what it reads."""
    if any(frame.is_laid_out for frame in story.frames):
        yield f"`boxes` and `masks` are read by iterative mode alone; {mode} mode goes by {goes_by}"
    if any(character.references for character in story.characters):
        yield f"pictures of characters are read by iterative mode alone; {mode} mode goes by {goes_by}"
    if story.initial_pictures and mode != "reference":
        yield f"`initial_pictures` are read by iterative and reference mode alone; {mode} mode goes by {goes_by}"
    if story.first_frame is not None:
        yield "`first_frame` is read by causal mode alone; this story is drawn without it"


def check_bank(frames: Sequence[int], story: Story, bank: int) -> None:
    """InputError where the first `bank` frames, which the later ones see, are not redrawn together with these."""
    later = range(bank, len(story.frames))
    if frames[0] < bank and not set(later) <= set(frames):
        raise InputError(
            f"--frames: the frames from {bank} on were drawn from those before, frame {frames[0]} among them; wanted frames "
            f"from {bank} on alone, or all of these as well, such as {frames[0]}-"
        )


class Mode(Protocol):
    """An algorithm that draws stories, and what a run must know of it.

    unit: what a micro-batch counts, `frame` of a round or `story` side by side.
    """

    name: str
    unit: str

    def check(self, model: Model, story: Story, settings: Settings) -> None:
        """InputError where this model cannot draw the story."""

    def check_redraw(self, frames: Sequence[int], story: Story, settings: Settings) -> None:
        """InputError where these of a story's frames cannot be redrawn alone."""

    def reference_groups(self, story: Story, settings: Settings) -> list[int]:
        """Pictures in each group of references that a UNet call holds at most."""

    def unused(self, story: Story, settings: Settings) -> dict[str, str]:
        """Settings of this mode that decide nothing in this story, each with the reason."""

    def notices(self, model: Model, story: Story, settings: Settings) -> Iterator[str]:
        """What the user should know before drawing begins, what the story says in vain among it."""

    def group(self, story: Story, settings: Settings) -> Hashable | None:
        """Equal for stories that are drawn in one batch; None for a story that is drawn alone."""

    def draw(
        self, model: Model, plans: Sequence[StoryPlan], *, batch_sizes: Sequence[int], size: tuple[int, int]
    ) -> Iterator[Event]:
        """Draw what is not finished; yields events, among them every picture.

        batch_sizes: units at once in round, or at frame, 0, 1, ..; the last entry stands for all later ones. size: of the
        pictures, (width, height) in pixels.
        """

    def method(self, settings: Settings) -> dict[str, str]:
        """The settings of this mode as the storybook prints them."""

    def picture_values(self, settings: Settings, round: int) -> dict[str, Any]:
        """The settings of this mode as a picture of `round` carries them."""


_MODULES = {
    name: f"fastory.modes.{name}" for name in ("iterative", "causal", "plain", "reference", "consistent")
}
_modes: dict[str, Mode] = {}


def register(mode: Mode, traits: ModeTraits) -> None:
    """Add a mode under its name. traits: what settings must know of it."""
    MODES[mode.name] = traits
    _modes[mode.name] = mode


def mode_of(name: str) -> Mode:
    """The mode of this name, which Settings has checked."""
    if name not in _modes:
        import_module(_MODULES[name])  # a module of a mode registers it
    return _modes[name]
