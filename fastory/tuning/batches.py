"""The frames of a step: which stories, which stretch of each, which noise. A step's number and the seed decide all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastory.checkpoints.history import History
from fastory.tuning.batch import Batch
from fastory.tuning.objectives.paired_stories import LEAST_NOISE, PairedStories, paired_rows, patches_of
from fastory.tuning.sizes import Tuning
from fastory.tuning.tables import Tables, history_pixels


class Batches:
    """Draws batches from the tables. stories: which of them."""

    def __init__(
        self,
        tables: Tables,
        stories: Sequence[int],
        tuning: Tuning,
        history: History,
        timesteps: int,
        paired: PairedStories = (),
    ) -> None:
        """timesteps: of the base's noise schedule. paired: stories of the same captions, for what paired_stories.py adds."""
        self.tables, self.stories, self.tuning, self.timesteps = tables, list(stories), tuning, timesteps
        self.positions, self.processor = history.encoder.config.positions, history.image_processor
        self.groups = [np.array(group) for group in paired]
        self.group_of = {story: group for group in self.groups for story in group.tolist()}

    def draw(self, *key: int, references: bool = False) -> Batch:
        """The batch of a step. key: what it depends on beside the tuning's seed, such as step and process.

        references: with what an IP-Adapter is given, to be imitated.
        """
        rng = np.random.default_rng([self.tuning.seed, *key])
        paired = bool(self.tuning.contrast)
        chosen = (
            self._pairs(rng) if paired else np.resize(rng.permutation(self.stories), self.tuning.batch_size)
        )
        starts = self.tables.starts
        stretches = []
        for number, story in enumerate(chosen):
            length = min(self.tuning.frames, self.tables.length(story))
            if not (paired and number % 2):  # the second of a pair takes the same stretch
                first = int(rng.integers(self.tables.length(story) - length + 1))
            stretches.append(np.arange(starts[story] + first, starts[story] + first + length))
        return self.of(stretches, rng, references, chosen.tolist() if self.groups else ())

    def _pairs(self, rng: np.random.Generator) -> np.ndarray:
        """Two stories of one group, then two of another, .."""
        chosen = np.resize(rng.permutation(len(self.groups)), self.tuning.batch_size // 2)
        return np.concatenate([rng.choice(self.groups[n], 2, replace=False) for n in chosen])

    def of(
        self,
        stretches: Sequence[np.ndarray],
        rng: np.random.Generator,
        references: bool,
        stories: Sequence[int] = (),
    ) -> Batch:
        """The batch of these stretches of frames; every frame of each is drawn. stories: whose they are."""
        rows = np.concatenate(stretches)
        latents = self.tables.take("latents", rows)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
        timesteps = self._timesteps(rng, len(rows))
        dropped = torch.from_numpy(rng.random(len(rows)) < self.tuning.dropout)
        window = self._window(rng, max(map(len, stretches)) - 1)
        index = torch.from_numpy(np.concatenate([np.arange(len(s)) for s in stretches]))
        if self.tuning.first_frames:
            index[torch.from_numpy(rng.random(len(rows)) < self.tuning.first_frames)] = 0
        pairs = None
        if self.tuning.contrast:
            pairs = paired_rows([len(s) for s in stretches])
            first, second = pairs.unbind(1)
            for values in (timesteps, dropped, index):
                values[second] = values[first]
            pairs = pairs[(index[first] > 0) & ~dropped[first]]
            noise[pairs[:, 1]] = noise[pairs[:, 0]]
        preserved = (index == 0) | dropped if self.tuning.preserve else None
        patches = None
        if self.tuning.patches and stories:
            owners = np.repeat(stories, [len(s) for s in stretches])
            seen = torch.from_numpy(rng.random(len(rows)) < self.tuning.patches)
            seen &= ~dropped & (timesteps >= LEAST_NOISE * self.timesteps)
            if preserved is not None:
                seen &= ~preserved
            others = latents.clone()
            for row in torch.where(seen)[0].tolist():
                others[row] = self._paired_latents(int(owners[row]), int(rows[row]), rng)
            patches = patches_of(latents, others, seen, pairs, rng)
        return Batch(
            **self._history(stretches, references),
            story=torch.from_numpy(np.repeat(np.arange(len(stretches)), [len(s) for s in stretches])),
            index=index,
            latents=latents,
            noise=noise,
            timesteps=timesteps,
            captions=self.tables.take("captions", rows),
            unseen=self.tables.take("unseen", rows),
            dropped=dropped,
            window=window,
            pairs=pairs,
            patches=patches,
            preserved=preserved,
        )

    def _paired_latents(self, story: int, row: int, rng: np.random.Generator) -> Tensor:
        """The latents of the same frame in a story of the same captions; its own where there is none."""
        others = [other for other in self.group_of.get(story, ()) if other != story]
        if others:
            row += self.tables.starts[int(rng.choice(others))] - self.tables.starts[story]
        return self.tables.take("latents", np.array([row]))[0]

    def _history(self, stretches: Sequence[np.ndarray], references: bool) -> dict[str, Any]:
        """Every frame but the last of each stretch; a short stretch repeats its last one, which nobody sees."""
        longest = max(map(len, stretches)) - 1
        frames = np.stack([s[np.minimum(np.arange(longest), len(s) - 1)] for s in stretches])
        squares = self.tables.arrays["squares"][frames.ravel()]
        return {
            "ids": self.tables.take("ids", frames),
            "mask": self.tables.take("mask", frames),
            "pixels": history_pixels(self.processor, squares).unflatten(0, frames.shape),
            "references": self.tables.take("references", frames) if references else None,
        }

    def _timesteps(self, rng: np.random.Generator, rows: int) -> Tensor:
        """Uniform, and a share once more in the upper half, where layout and colours are decided."""
        drawn = rng.integers(0, self.timesteps, rows)
        upper = rng.integers(self.timesteps // 2, self.timesteps, rows)
        return torch.from_numpy(np.where(rng.random(rows) < self.tuning.high_noise, upper, drawn))

    def _window(self, rng: np.random.Generator, before: int) -> int:
        """L_M of the step."""
        window = self.tuning.window
        if window == "random":
            return int(rng.integers(1, min(before, self.positions) + 1))
        return 0 if window == "all" else int(window)
