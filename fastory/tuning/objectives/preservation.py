"""Frames without a history stay what the base makes of them.

Low-rank updates learn to follow a history from few captions, and what a caption alone says suffers, most of all in scenes that
are not among them: noise says little about either. But of a frame that has no history, the first one of a story and the
unconditional row, it is known what should come out: what the base gives, without noise of its own. So there

loss = weight * |prediction - the base's prediction|^2

takes the place of the noise loss, as "Learning without Forgetting" (Li and Hoiem, ECCV 2016, section 3) has it. No
patches are removed there: the base does not remove them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastory.conditioning.references import References
from fastory.models.copies import unet_copy
from fastory.models.torch_model import StoryModel
from fastory.processors.projected import CrossAttentionLayers


class Untuned:
    """The base as it is before the tuning, weights shared, low-rank updates not. weight: of the loss, see above."""

    def __init__(self, model: StoryModel, weight: float) -> None:
        self.unet = unet_copy(model.unet).requires_grad_(False)
        self.layers = CrossAttentionLayers(self.unet)
        self.weight = weight

    @torch.no_grad()
    def predict(self, noisy: Tensor, timesteps: Tensor, captions: Tensor) -> Tensor:
        """The UNet's output (R, c, h, w) from captions (R, Lt, C_x) alone, as round 0 of iterative mode has it."""
        text = self.layers.project_text(captions)
        references = References.of(
            (),
            lambda: captions[:0],  # without groups there is no null block
            self.layers.project_references,
            tokens_per_ref=1,
            like=text,
        )
        context = references.context(len(text))
        context.text_kv.copy_(text)
        output: Tensor = self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=None,
            cross_attention_kwargs={"context": context},
            return_dict=False,
        )[0]
        return output

    def in_rows(
        self, rows: Tensor, wanted: Tensor, noisy: Tensor, timesteps: Tensor, captions: Tensor
    ) -> Tensor:
        """`wanted` (R, c, h, w) with the base's prediction in the rows (R,) that are True."""
        predicted = self.predict(noisy[rows], timesteps[rows], captions[rows])
        return wanted.masked_scatter(rows.view(-1, 1, 1, 1), predicted.to(wanted))

    def weights(self, rows: Tensor) -> Tensor:
        """(R, 1, 1, 1): this loss's weight in the rows (R,) that are True, 1 in the others."""
        return torch.where(rows, self.weight, 1.0).view(-1, 1, 1, 1)
