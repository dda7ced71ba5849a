"""Characters of causal mode where boxes or masks put them: what is said of them reaches them alone.

The words of a frame's caption reach the masks of whom they name. History tokens stand for words of earlier captions, and
speak of the character whose word is nearest; they reach its mask and what nobody has. In self-attention characters do not see
each other. Iterative mode finds characters by itself, in a frame's picture of the last round; here it has none yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastory.conditioning.biases import Biases
from fastory.conditioning.regions import Grid, apart, history_bias, self_bias, text_bias
from fastory.models.protocol import Model, WithHistory
from fastory.models.text import nearest_tokens, token_places
from fastory.modes.regions import mentions, placed
from fastory.story import Story


class LaidOut:
    """Where the characters of a story are, by frame."""

    def __init__(
        self, model: Model, history: WithHistory, story: Story, prompts: Sequence[str], size: tuple[int, int]
    ) -> None:
        """prompts: of every frame. size: of the pictures, (width, height) in pixels."""
        self.tokenizer, self.history, self.prompts = model.tokenizer, history, prompts
        self.grid = Grid(size[1] // model.vae_factor, size[0] // model.vae_factor)
        self.masks = [apart(masks) if masks else {} for masks in placed(story, self.grid)]
        self.casts = [mentions(story, i, prompt, plain=False) for i, prompt in enumerate(prompts)]

    def bias(self, frame: int, caption_tokens: int, earlier: Sequence[int], positions: int) -> Biases | None:
        """(1, L, Lt + L_M * S) for every layer, None in a frame without boxes and masks.

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
        """(1, L, L) for every bounded layer of self-attention, None in a frame without boxes and masks."""
        return self_bias(list(self.masks[frame].values()), self.grid) if self.masks[frame] else None
