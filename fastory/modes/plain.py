"""Plain mode: every frame from its caption alone, x_i = D(c_i, z): the baseline that the papers call SDM.

Prompt-SDM is the same with a style, which stands in every caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastory.events import Event
from fastory.models.protocol import Model
from fastory.modes.mode import StoryPlan, mode_of, not_read, register
from fastory.settings import MODES, Settings
from fastory.story import Story


class Plain:
    """Round 0 of iterative mode, and no other."""

    name = "plain"
    unit = "frame"

    def check(self, model: Model, story: Story, settings: Settings) -> None:
        """Every model draws from captions."""

    def check_redraw(self, frames: Sequence[int], story: Story, settings: Settings) -> None:
        """Any frames can be redrawn: none sees another."""

    def reference_groups(self, story: Story, settings: Settings) -> list[int]:
        """None."""
        return []

    def unused(self, story: Story, settings: Settings) -> dict[str, str]:
        """Nothing of its own is read in vain: it has nothing of its own."""
        return {}

    def notices(self, model: Model, story: Story, settings: Settings) -> Iterator[str]:
        """That no picture of the story is read."""
        yield from not_read(story, self.name, "captions alone")

    def group(self, story: Story, settings: Settings) -> None:
        """Every story is drawn alone: its frames fill the micro-batches."""

    def draw(
        self, model: Model, plans: Sequence[StoryPlan], *, batch_sizes: Sequence[int], size: tuple[int, int]
    ) -> Iterator[Event]:
        """The one story, as iterative mode draws round 0."""
        (plan,) = plans
        settings = replace(plan.settings.with_own_alone(), iterations=0, regions="off")
        plans = [replace(plan, settings=settings)]
        return mode_of("iterative").draw(model, plans, batch_sizes=batch_sizes, size=size)

    def method(self, settings: Settings) -> dict[str, str]:
        """That there are no references."""
        return {"References": "none, captions alone"}

    def picture_values(self, settings: Settings, round: int) -> dict[str, Any]:
        """Nothing beside what every picture carries."""
        return {}


register(Plain(), MODES["plain"])
