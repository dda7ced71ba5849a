"""Characters of causal mode where they stand: what is said of them reaches them alone.

The words of a frame's caption reach the masks of whom they name. History tokens stand for words of earlier captions, and
speak of the character whose word is nearest; they reach its mask and what nobody has. In self-attention characters do not see
each other. Masks are the story's boxes and masks, and where a frame of several characters has none, found while it is drawn:
iterative mode finds them in a frame's picture of the last round, and here there is none yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastory.conditioning.biases import Biases
from fastory.conditioning.regions import Grid, apart, from_maps, history_bias, self_bias, text_bias
from fastory.models.protocol import Model, WithHistory
from fastory.models.text import nearest_tokens, token_places
from fastory.modes.regions import is_plain, mentions, placed, without
from fastory.settings import Settings
from fastory.story import Story

# Shares of the steps after which characters are looked for: where each is to stand is decided first, its looks soon after.
# Outlines are clearer the second time.
LOOKED_FOR = (0.08, 0.2)


def looked_for_at(calls: int) -> set[int]:
    """The UNet calls, of `calls` numbered from 0, before which the characters of a frame are found; never before the first."""
    return {max(1, round(share * calls)) for share in LOOKED_FOR}


class LaidOut:
    """Where the characters of a story are, by frame."""

    def __init__(
        self,
        model: Model,
        history: WithHistory,
        story: Story,
        prompts: Sequence[str],
        size: tuple[int, int],
        settings: Settings,
    ) -> None:
        """prompts: of every frame. size: of the pictures, (width, height) in pixels."""
        self.tokenizer, self.history, self.prompts = model.tokenizer, history, prompts
        self.grid = Grid(size[1] // model.vae_factor, size[0] // model.vae_factor)
        self.boxed = placed(story, self.grid)
        self.masks = [apart(masks) for masks in self.boxed]
        plain = is_plain(model, story, settings)
        self.casts = [mentions(story, i, prompt, plain) for i, prompt in enumerate(prompts)]
        self.finds = settings.regions != "off"

    def captions_without(self, frame: int) -> dict[str, str]:
        """The caption of a frame without each character that is to be found in it; none where nobody is.

        Nobody, either, where one of several has neither box nor words: between the others nobody knows where it is.
        """
        cast, boxed = self.casts[frame], self.boxed[frame]
        missing = [name for name in cast if name not in boxed]
        if not self.finds or len(cast) < 2 or not missing or not all(cast[name] for name in missing):
            return {}
        return {name: without(self.prompts[frame], spans) for name, spans in cast.items() if spans}

    def find(self, frame: int, maps: Mapping[str, Tensor]) -> None:
        """Where the characters of a frame are by their maps (h, w); boxes and masks of the story stay."""
        found = {**from_maps(maps, self.grid), **self.boxed[frame]}
        self.masks[frame] = apart({name: found[name] for name in self.casts[frame]})

    def forget(self, frame: int) -> None:
        """The frame as it is before anybody is found."""
        self.masks[frame] = apart(self.boxed[frame])

    def bias(self, frame: int, caption_tokens: int, earlier: Sequence[int], positions: int) -> Biases | None:
        """(1, L, Lt + L_M * S) for every layer, None in a frame of which nobody knows.

        earlier: the frames of the window, oldest first; positions: L_M, of which the further ones are empty.
        """
        masks = self.masks[frame]
        if not masks:
            return None
        words = token_places(self.tokenizer, self.prompts[frame], self.casts[frame])
        tokens = self.history.encoder.config.frame_tokens
        spoken: dict[str, list[int]] = {name: [] for name in masks}
        for position, other in enumerate(earlier):
            for name, of_it in self._spoken(other, tokens).items():
                spoken.setdefault(name, []).extend(position * tokens + token for token in of_it)
        of_caption = text_bias(masks, words, caption_tokens, self.grid)
        of_history = history_bias(masks, spoken, positions * tokens, self.grid)
        return {layer: torch.cat([of_caption[layer], of_history[layer]], 2) for layer in of_caption}

    def _spoken(self, frame: int, tokens: int) -> dict[str, list[int]]:
        """Of whom the history tokens of a frame speak."""
        named = token_places(self.history.tokenizer, self.prompts[frame], self.casts[frame], tokens)
        return nearest_tokens(named, tokens)

    def between(self, frame: int) -> Biases | None:
        """(1, L, L) for every bounded layer of self-attention, None in a frame of which nobody knows."""
        return self_bias(list(self.masks[frame].values()), self.grid) if self.masks[frame] else None
