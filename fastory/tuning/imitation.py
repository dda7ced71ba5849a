"""The first steps of a tuning: from its history, each cross-attention layer learns to give what an IP-Adapter gives.

A new history means nothing to the UNet, and the noise loss says so only through the whole network and beneath the noise of
its target. An IP-Adapter of the same base has already learned what a layer must give for a picture. So the base draws with
the history's frames as references (algorithms.md, section 1), and every layer learns its output there:

sum over layers l of |attn_l(x_l, history) - attn_l(x_l, references)|^2 / Var(attn_l(x_l, references))

The inputs x_l are the teacher's: no gradient runs through the UNet, which makes such a step cheaper than one of noise.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastory.attention import CrossAttentionLayers, ReferenceContext
from fastory.model import StoryModel

Lesson = dict[str, tuple[Tensor, Tensor]]
"""Layer -> what went in and what came out, (B, L, C) each."""


class Teacher:
    """The base and its IP-Adapter as they are before the tuning, weights shared, low-rank updates not."""

    def __init__(self, model: StoryModel, scale: float) -> None:
        """scale: the weight l of the references. Raises InputError where the base has no IP-Adapter."""
        self.null = model.null_reference().clone()  # one of inference mode could not meet autograd
        shared = {id(p): p for p in [*model.unet.parameters(), *model.unet.buffers()]}
        self.unet: Any = copy.deepcopy(model.unet, memo=dict(shared)).requires_grad_(False)
        self.layers = CrossAttentionLayers(self.unet, model.layers.key_weights, model.layers.value_weights)
        self.tokens_per_ref, self.scale = model.tokens_per_ref, scale

    @torch.no_grad()
    def lesson(
        self, noisy: Tensor, timesteps: Tensor, captions: Tensor, references: Tensor, visible: Tensor
    ) -> Lesson:
        """What the cross-attentions of one call take and give.

        noisy (R, c, h, w), captions (R, Lt, C_x), references (n, T, C_x); visible (R, n + 1) bool, whether a row sees
        a reference, and last the null reference.
        """
        tokens = torch.cat([references.flatten(0, 1)[None], self.null.to(references)], 1)
        context = ReferenceContext(
            text_kv=self.layers.project_text(captions),
            ref_kv=self.layers.project_references(tokens),
            scale=torch.full((1,), self.scale, device=tokens.device),
            ref_visible=visible,
            ref_offsets=torch.tensor([0, tokens.shape[1]], dtype=torch.int32, device=tokens.device),
            tokens_per_ref=self.tokens_per_ref,
        )
        lesson: Lesson = {}
        hooks = [
            layer.attn.register_forward_hook(
                lambda _, inputs, output, name=layer.name: lesson.update({name: (inputs[0], output)})
            )
            for layer in self.layers.layers
        ]
        try:
            self.unet(
                noisy,
                timesteps,
                encoder_hidden_states=None,
                cross_attention_kwargs={"context": context},
                return_dict=False,
            )
        finally:
            for hook in hooks:
                hook.remove()
        return lesson


def difference(layers: CrossAttentionLayers, lesson: Lesson, context: Any) -> Tensor:
    """How far the layers are from the lesson where they see `context`: the mean share of variance, 0 is equal."""
    shares = []
    for layer in layers.layers:
        taken, wanted = lesson[layer.name]
        given = layer.attn(taken, context=context)
        shares.append(nn.functional.mse_loss(given.float(), wanted.float()) / wanted.float().var())
    return torch.stack(shares).mean()
