"""References of a training frame by character: what they are, where they reach, and the attention that reads them.

As a run with `regions` has them: a character's references are its appearances in other frames, cut out where it was not alone,
and they reach its own mask. Boxes of drawn scenes are the truth; they are moved a little, as found masks are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from PIL import Image
from torch import Tensor

from fastory.builtin.training.networks import LATENT_SIZE
from fastory.builtin.world.drawing import Box
from fastory.conditioning.regions import Grid, apart, cut_out, rest_of

GROUPS = 3  # the story's pictures, those of the left character, those of the right one
GRID = Grid(LATENT_SIZE, LATENT_SIZE)
MOVED = 0.05  # of the picture: how far an edge of a mask may be from the drawn one


def moved(rng: np.random.Generator, box: Box) -> Box:
    """A box whose edges are off by a little."""
    left, top, right, bottom = (edge + rng.uniform(-MOVED, MOVED) for edge in box)
    return max(0.0, left), max(0.0, top), min(1.0, right), min(1.0, bottom)


def masks_of(rng: np.random.Generator, boxes: Sequence[Box]) -> Tensor:
    """(3, 16, 16): where the story's pictures, the left and the right character's reach in a frame of two."""
    own = apart({str(n): GRID.box(moved(rng, box)) for n, box in enumerate(boxes)})
    return torch.stack([rest_of(list(own.values())), *own.values()])


def whole_picture(group: int) -> Tensor:
    """(3, 16, 16): one group reaches everything, the others nothing."""
    masks = torch.zeros(GROUPS, LATENT_SIZE, LATENT_SIZE)
    masks[group] = 1
    return masks


def parts_of(rng: np.random.Generator, picture: np.ndarray, boxes: Sequence[Box]) -> list[np.ndarray]:
    """What a run would cut out of a picture (128, 128, 3) for each character, at the picture's size."""
    image = Image.fromarray(picture)
    found = (cut_out(image, GRID.box(moved(rng, box))) for box in boxes)
    return [np.asarray((part or image).resize(image.size, Image.Resampling.BICUBIC)) for part in found]


class GroupedAdapter(IPAdapterAttnProcessor2_0):
    """diffusers' IP-Adapter with its parameters by the same names, and references in groups: a softmax and a mask each."""

    def __call__(  # type: ignore[override]  # text and references always come together here
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, list[Tensor]],
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (B, L, C). encoder_hidden_states: text (B, Lt, W) and references [(B, 3 N, T, W)].

        ip_adapter_masks: (B, 3, h, w); without them the first group reaches everything and the others nothing.
        """
        text, (references,) = encoder_hidden_states
        query = self._heads(attn, attn.to_q(hidden_states))
        out = self._attend(query, self._heads(attn, attn.to_k(text)), self._heads(attn, attn.to_v(text)))
        groups = references.flatten(1, 2).chunk(GROUPS if ip_adapter_masks is not None else 1, 1)
        side = int(hidden_states.shape[1] ** 0.5)
        for number, group in enumerate(groups):
            keys = self._heads(attn, self.to_k_ip[0](group))
            values = self._heads(attn, self.to_v_ip[0](group))
            own = self.scale[0] * self._attend(query, keys, values)
            if ip_adapter_masks is not None:
                mask = F.adaptive_avg_pool2d(ip_adapter_masks[:, number : number + 1], side)
                own = own * mask.flatten(2).transpose(1, 2)[:, None]
            out = out + own
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))

    @staticmethod
    def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Softmax attention in plain products: on a CPU the fused one is slow backwards in bfloat16."""
        scores = query * query.shape[-1] ** -0.5 @ keys.transpose(-1, -2)
        return scores.float().softmax(-1).to(values.dtype) @ values

    @staticmethod
    def _heads(attn: Attention, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, H, L, d)."""
        return tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
